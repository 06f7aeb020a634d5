"""Data sets: photos with masks or with tags, in one of three layouts, read alike.

folder      images/SPLIT/NAME.jpg, labels/SPLIT/NAME.png, classes.json
voc         PASCAL VOC 2012's development kit
cityscapes  leftImg8bit/SPLIT/CITY/..., gtFine/SPLIT/CITY/...

Tags, the classes that a photo shows, are in labels.csv or labels.json beside any of them.
"""

from srdeploy.data.classes import ClassTable
from srdeploy.data.dataset import DataSet, open_dataset, spec_for, splits_of
from srdeploy.data.pairs import Item
from srdeploy.data.tags import TaggedSet, open_tagged

__all__ = [
    "ClassTable",
    "DataSet",
    "Item",
    "TaggedSet",
    "open_dataset",
    "open_tagged",
    "spec_for",
    "splits_of",
]
