"""Data sets: photos with masks in one of three layouts, read alike.

folder      images/SPLIT/NAME.jpg, labels/SPLIT/NAME.png, classes.json
voc         PASCAL VOC 2012's development kit
cityscapes  leftImg8bit/SPLIT/CITY/..., gtFine/SPLIT/CITY/...
"""

from srdeploy.data.classes import ClassTable
from srdeploy.data.dataset import DataSet, open_dataset, spec_for, splits_of
from srdeploy.data.pairs import Item

__all__ = ["ClassTable", "DataSet", "Item", "open_dataset", "spec_for", "splits_of"]
