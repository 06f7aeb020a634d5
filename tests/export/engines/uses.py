"""Which of TensorRT's names our code uses, held against what a package offers.

The code's objects of TensorRT are Any to the type checker. Here their classes follow from names
(NAMES) where a function or class takes them, and from the bindings' own signatures from there on.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = {
    "_context": "IExecutionContext",
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "log": "ILogger",
    "logger": "ILogger",
    "makers": "many ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "plan": "ICudaEngine",
    "tensor": "ITensor",
    "trt": "module",
    "type_": "DataType",
}
"""Parameters and fields annotated Any (or mappings to Any) -> class in TensorRT."""
OTHERS = {"severity", "_graph", "layer"}
"""Such parameters that are nothing of TensorRT's with attributes."""
RTX_ONLY = {
    "ComputeCapability",
    "CudaGraphStrategy",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeConfig.cuda_graph_strategy",
}
"""What only TensorRT for RTX has; the code takes it only on that branch."""
OUR_OWN = {"ILogger.messages", "ILogger.errors"}
"""Attributes of our subclasses."""

_SIGNATURE = re.compile(r"^(?:\d+\. )?\w*\((.*)\) -> (.+)$")


@dataclass
class Report:
    """What was found in some files."""

    used: set[str] = field(default_factory=set)
    """E.g. "Builder.create_network", "BuilderFlag.TF32"."""
    faults: list[str] = field(default_factory=list)


def read_uses(files: list[Path], names: dict[str, Any], rtx: bool) -> Report:
    """Uses in `files`, against a package as describe_bindings tells it."""
    report = Report()
    for file in files:
        reader = _Reader(file.name, names, rtx, report)
        reader.body(ast.parse(file.read_text()).body, {})
    return report


@dataclass
class _Reader:
    file: str
    names: dict[str, Any]
    rtx: bool
    report: Report

    def body(self, statements: list[ast.stmt], scope: dict[str, str | None]) -> None:
        for statement in statements:
            self.statement(statement, scope)

    def statement(self, node: ast.stmt, scope: dict[str, str | None]) -> None:
        if isinstance(node, ast.FunctionDef):
            inner = dict(scope)
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            inner |= {a.arg: self.declared(a.arg, a.annotation) for a in arguments}
            self.body(node.body, inner)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                self.kind(base, scope)
            self.body(node.body, dict(scope))
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for part, value in zip(target.elts, node.value.elts, strict=True):
                    self.bind(part, self.kind(value, scope), scope)
            else:
                self.bind(target, self.kind(node.value, scope), scope)
        elif isinstance(node, ast.AnnAssign):
            declared = isinstance(node.target, ast.Name) and self.declared(
                node.target.id, node.annotation
            )
            kind = self.kind(node.value, scope) if node.value is not None else None
            self.bind(node.target, kind or declared or None, scope)
        elif isinstance(node, ast.For):
            self.bind(node.target, _one_of(self.kind(node.iter, scope)), scope)
            self.body(node.body + node.orelse, scope)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.kind(child, scope)
                elif isinstance(child, ast.stmt):
                    self.statement(child, scope)
                elif isinstance(child, ast.ExceptHandler):
                    self.body(child.body, scope)
                elif isinstance(child, ast.withitem):
                    self.kind(child.context_expr, scope)

    def declared(self, name: str, annotation: ast.expr | None) -> str | None:
        """The class of a parameter or field that is annotated Any."""
        text = "" if annotation is None else ast.unparse(annotation)
        if text not in ("Any", "Mapping[str, Any]"):
            return None
        if name not in NAMES and name not in OTHERS and text == "Any":
            self.fault(annotation, f"'{name}: Any' is not told in NAMES")
        return NAMES.get(name)

    def bind(self, target: ast.expr, kind: str | None, scope: dict[str, str | None]) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = kind
        elif isinstance(target, ast.Tuple):
            for part in target.elts:
                self.bind(part, None, scope)
        else:
            self.kind(target, scope)

    def kind(self, node: ast.expr, scope: dict[str, str | None]) -> str | None:
        """The class of an expression's value, where it is TensorRT's."""
        if isinstance(node, ast.Name):
            return scope.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.attribute(node, scope, None)
        if isinstance(node, ast.Call):
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                self.kind(argument, scope)
            if isinstance(node.func, ast.Attribute):
                return self.attribute(node.func, scope, node)
            self.kind(node.func, scope)
            return "module" if ast.unparse(node.func) == "import_tensorrt" else None
        if isinstance(node, ast.Subscript):
            return _one_of(self.kind(node.value, scope))
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.DictComp | ast.SetComp):
            inner = dict(scope)
            for part in node.generators:
                self.bind(part.target, _one_of(self.kind(part.iter, inner)), inner)
                for condition in part.ifs:
                    self.kind(condition, inner)
            if isinstance(node, ast.DictComp):
                self.kind(node.key, inner)
            element = self.kind(node.value if isinstance(node, ast.DictComp) else node.elt, inner)
            return None if element is None else f"many {element}"
        if isinstance(node, ast.List | ast.Tuple):
            kinds = [self.kind(part, scope) for part in node.elts]
            return f"many {kinds[0]}" if kinds and kinds[0] is not None else None
        kinds = [self.kind(c, scope) for c in ast.iter_child_nodes(node) if isinstance(c, ast.expr)]
        return next((k for k in kinds[1:] if k), None) if isinstance(node, ast.IfExp) else None

    def attribute(
        self, node: ast.Attribute, scope: dict[str, str | None], call: ast.Call | None
    ) -> str | None:
        """Notes the use of an attribute; its class, or that of what it returns."""
        owner = self.kind(node.value, scope)
        if owner is None:
            return NAMES.get(node.attr) if call is None else None
        if owner.startswith("many "):
            return _one_of(owner) if node.attr == "get" else None
        if owner == "module":
            return self.module_attribute(node, call)
        is_class = owner.startswith("type ")
        owner = owner.removeprefix("type ")
        use = f"{owner}.{node.attr}"
        self.report.used.add(use)
        found = self.names.get(owner, {}).get(node.attr)
        if found is None:
            if use not in OUR_OWN and (self.rtx or use not in RTX_ONLY):
                self.fault(node, f"{use} does not exist")
            return None
        if found["member"]:
            return owner
        signatures = [m.groups() for line in found["text"].splitlines() if (m := _match(line))]
        if call is not None and signatures:
            self.check_call(node, use, call, [one[0] for one in signatures], is_class)
        return self.returned(signatures[0][1]) if signatures else None

    def module_attribute(self, node: ast.Attribute, call: ast.Call | None) -> str | None:
        self.report.used.add(node.attr)
        if node.attr not in self.names:
            if self.rtx or node.attr not in RTX_ONLY:
                self.fault(node, f"{node.attr} does not exist")
            return None
        described = self.names[node.attr]
        if described is None:
            return None
        if call is None:
            return f"type {node.attr}"
        lines = described["__init__"]["text"].splitlines()
        signatures = [match.group(1) for line in lines if (match := _match(line))]
        self.check_call(node, node.attr, call, signatures, False)
        return node.attr

    def check_call(
        self, node: ast.AST, use: str, call: ast.Call, signatures: list[str], is_class: bool
    ) -> None:
        if not any(_fits(call, list(_parameters(text)), is_class) for text in signatures):
            offered = " or ".join(f"({text})" for text in signatures) or "nothing"
            self.fault(node, f"{use} takes {offered}, not {ast.unparse(call)}")

    def returned(self, text: str) -> str | None:
        name = re.split(r"\.|::", text.rstrip("]"))[-1]
        if name not in self.names:
            name = name.removeprefix("I")  # of a class that was bound later
        if self.names.get(name) is None:
            return None
        return f"many {name}" if text.startswith("list[") else name

    def fault(self, node: ast.AST | None, text: str) -> None:
        self.report.faults.append(f"{self.file}:{getattr(node, 'lineno', 0)}: {text}")


def _match(line: str) -> re.Match[str] | None:
    return _SIGNATURE.match(line.strip())


def _one_of(kind: str | None) -> str | None:
    return kind.removeprefix("many ") if kind is not None and kind.startswith("many ") else None


def _parameters(text: str) -> Iterator[tuple[str, bool]]:
    """(name, has a default) of a signature such as "self: a.B, input: str, path: str = None"."""
    depth, start = 0, 0
    for index, character in enumerate(text + ","):
        depth += (character in "[(<{") - (character in "])>}")
        if character == "," and depth == 0:
            part = text[start:index].strip()
            start = index + 1
            if part and part != "*":
                yield part.partition(":")[0], "=" in part


def _fits(call: ast.Call, parameters: list[tuple[str, bool]], is_class: bool) -> bool:
    """Whether the call's arguments go with the parameters; the first of them is self."""
    offered = parameters if is_class else parameters[1:]
    keywords = [keyword.arg for keyword in call.keywords]
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return set(keywords) <= {name for name, _ in offered}
    rest = offered[len(call.args) :]
    if len(call.args) > len(offered) or not set(keywords) <= {name for name, _ in rest}:
        return False
    return all(default or name in keywords for name, default in rest)
