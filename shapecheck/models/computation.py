"""Describe all that decides what a live model computes beside its weights, or say what cannot be described.

What is kept for a model, such as its ONNX file, may be used again only if nothing is different. Of code in known packages their
versions tell enough; of any other nothing does: it may read what it likes.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import importlib.metadata
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "shapecheck")
"""Packages whose code is known by their versions."""
_DISTRIBUTIONS = {"shapecheck": "shapecheck-controlnet"}
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_BEFORE_CALLS = frozenset(("__init__", "__setstate__", "smart_apply"))
"""Methods that no call of a model comes to. PyTorch's compiler replaces them; transformers puts the last one on all modules."""
_SIMPLE = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)
_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType)
_TENSORS = frozenset((Tensor, nn.Parameter, nn.Buffer, nn.UninitializedParameter))


@dataclass(frozen=True, slots=True)
class Computation:
    """Digests of what decides a model's numbers beside its weights: equal ones compute the same, if nothing is `unseen`."""

    settings: str
    """A digest of modules, hooks and functions."""
    forms: str
    """A digest of shapes and dtypes of the parameters, and which of them are one."""
    unseen: tuple[str, ...]
    """In words, what decides the numbers too and cannot be described: a hook of the user's, for example."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.settings} {self.forms}".encode()).hexdigest()


def describe_computation(model: nn.Module) -> Computation:
    """Describe classes, settings, hooks and replaced methods of all modules, and functions of PyTorch that were exchanged."""
    description = _Description(model)
    lines = [*description.describe_surroundings(), *description.describe_modules(model), *description.describe_functions()]
    forms = [*description.describe_forms(model)]
    versions = [f"{package} {_find_version(package)}" for package in sorted(description.packages)]
    settings, digest = (hashlib.sha256("\n".join(texts).encode()).hexdigest() for texts in ([*versions, *lines], forms))
    return Computation(settings, digest, tuple(dict.fromkeys(description.unseen)))


class _Description:
    """Collects the words for one model."""

    def __init__(self, model: nn.Module) -> None:
        self.unseen: list[str] = []
        self.packages: set[str] = {"torch", "diffusers"}
        self._names = {id(module): name or "the model" for name, module in model.named_modules()}
        self._classes: dict[type, str] = {}
        self._functions: dict[tuple[types.FunctionType, tuple[str, ...]], str] = {}
        self._open: set[int] = set()
        """Ids of objects that are being described: one may hold itself."""

    def describe_surroundings(self) -> Iterable[str]:
        """Yield what holds for every model of this process."""
        yield f"default dtype {torch.get_default_dtype()}, autocast {torch.is_autocast_enabled('cuda')}"
        of_all: Any = torch.nn.modules.module
        if of_all._global_forward_hooks or of_all._global_forward_pre_hooks:
            self.unseen.append("a forward hook of every module of the process")
        modes = [torch._C._get_function_stack_at(at) for at in range(torch._C._len_torch_function_stack())]
        self.unseen += [
            f"a {type(mode).__name__} is active" for mode in modes if type(mode).__module__ != "torch.utils._device"
        ]
        for place in (torch, torch.nn.functional, Tensor):
            for name, value in vars(place).items():
                if callable(value) and not isinstance(value, type):
                    yield f"{place.__name__}.{name} {self._name_code(value, f'{place.__name__}.{name}', ())}"

    def describe_modules(self, model: nn.Module, prefix: str = "") -> Iterable[str]:
        """Yield class, settings, hooks and unsaved buffers of every module."""
        for name, module in model.named_modules(remove_duplicate=False):
            where = f"{prefix}{name}" or "the model"
            settings = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
            hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
            transient = {key: module._buffers[key] for key in sorted(module._non_persistent_buffers_set)}
            yield f"{where}: {self._describe_class(type(module))} {self._describe(settings, where)}"
            yield f"{where}: {self._describe(hooks, f'a forward hook of {where}')} {self._describe(transient, where)}"

    def describe_forms(self, model: nn.Module, prefix: str = "") -> Iterable[str]:
        """Yield a line for every parameter and buffer."""
        places: dict[int, int] = {}  # which tensors are one
        for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
            if type(value) not in _TENSORS:
                self.unseen.append(f"{prefix}{name} is a {type(value).__name__}")
            yield f"{prefix}{name} {tuple(value.shape)} {value.dtype} {places.setdefault(id(value), len(places))}"

    def describe_functions(self) -> Iterable[str]:
        """Yield the functions in the files of the model's classes; of diffusers' other files only what is unseen is noted."""
        own = {kind.__module__ for kind in self._classes}
        for name, module in sorted(sys.modules.items()):
            if name.startswith("diffusers.models."):
                functions = [(key, value) for key, value in vars(module).items() if isinstance(value, types.FunctionType)]
                described = [f"{name}.{key} {self._name_code(value, f'{name}.{key}', ())}" for key, value in functions]
                if name in own:  # which others are imported is another matter in each process
                    yield from described

    def _describe(self, value: Any, where: str) -> str:
        """Return a text for a value that is the same in every process."""
        if value is None or isinstance(value, _SIMPLE):
            return repr(value)
        if isinstance(value, Tensor) or hasattr(value, "__array__"):
            return _digest_values(value)
        if isinstance(value, type):
            return self._describe_class(value)
        if isinstance(value, nn.Module) and id(value) in self._names:
            return f"module {self._names[id(value)]}"
        if id(value) in self._open:
            return "itself"
        self._open.add(id(value))
        try:
            return self._describe_whole(value, where)
        finally:
            self._open.discard(id(value))

    def _describe_whole(self, value: Any, where: str) -> str:
        """Return a text for something that has parts."""
        if isinstance(value, Mapping):
            is_config = (
                type(value).__name__ == "FrozenDict"
            )  # names of folders and versions in it say nothing of the computation
            items = [(str(key), value[key]) for key in value if not (is_config and str(key).startswith("_"))]
            return repr(sorted((key, self._describe(each, _join(where, key))) for key, each in items))
        if isinstance(value, list | tuple):
            return repr([self._describe(each, where) for each in value])
        if isinstance(value, set | frozenset):
            return repr(sorted(self._describe(each, where) for each in value))
        if isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
            return f"partial {[self._describe(part, where) for part in parts]}"
        if isinstance(value, types.MethodType):
            return f"{self._describe(value.__func__, where)} of {self._describe(value.__self__, where)}"
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            return f"{self._name_code(value, where, PACKAGES)} {[self._describe(each, where) for each in cells]}"
        if isinstance(value, _BUILTIN):
            return self._name_code(value, where, PACKAGES)
        if isinstance(value, nn.Module):
            return repr([*self.describe_modules(value, f"{where}: "), *self.describe_forms(value, f"{where}: ")])
        if hasattr(value, "__dict__"):
            return f"{self._describe_class(type(value))} {self._describe(vars(value), where)}"
        self.unseen.append(f"{where} is a {type(value).__qualname__}")
        return ""

    def _describe_class(self, kind: type) -> str:
        """Return the name of a class, whose methods have to be those of its package."""
        name = f"{kind.__module__}.{kind.__qualname__}"
        if kind not in self._classes:
            self._classes[kind] = name
            package = kind.__module__.partition(".")[0]
            if _find_class(kind) is not kind:
                self.unseen.append(f"the class {name} was made at run time")
            elif package not in PACKAGES and package not in sys.stdlib_module_names:
                self.unseen.append(f"the class {name} is not of {', '.join(PACKAGES[:-1])}")
            self.packages |= {package} & {*PACKAGES}
            methods = []
            for base in kind.__mro__[:-1]:
                for key, value in vars(base).items():
                    if key in _BEFORE_CALLS:
                        continue
                    if callable(value) or isinstance(value, property | classmethod | staticmethod | functools.cached_property):
                        methods.append(f"{key}={self._name_code(value, f'{base.__qualname__}.{key}', PACKAGES)}")
                    elif isinstance(value, _SIMPLE) and not key.startswith("__"):
                        methods.append(f"{key}={value!r}")
            self._classes[kind] = f"{name} {hashlib.sha256(repr(methods).encode()).hexdigest()}"
        return self._classes[kind]

    def _name_code(self, value: Any, where: str, packages: tuple[str, ...]) -> str:
        """Return the name of a function, which has to be in a file of these packages, or if there are none of any package."""
        if isinstance(value, property):
            return repr([self._name_code(each, where, packages) for each in (value.fget, value.fset) if each is not None])
        function: Any = getattr(value, "__func__", getattr(value, "func", value))  # of a method, of a cached property
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
        if isinstance(function, types.FunctionType):
            key = function, packages
            if key not in self._functions:
                self._functions[key] = name  # it may refer to itself
                self._functions[key] = self._describe_function(function, name, where, packages)
            return self._functions[key]
        return name

    def _describe_function(self, function: types.FunctionType, name: str, where: str, packages: tuple[str, ...]) -> str:
        """Return name, defaults, and the functions that it was made of, as a decorator does."""
        file = function.__code__.co_filename
        if not _is_installed(file, packages):
            self.unseen.append(f"{where} is a function of {Path(file).name}, {function.__qualname__}")
        inner = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        wrapped = [self._name_code(each, where, packages) for each in inner if isinstance(each, types.FunctionType)]
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        return repr([name, [each for each in defaults if isinstance(each, _SIMPLE)], wrapped])


def _find_class(kind: type) -> Any:
    """Return what stands where a class says that it is defined."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found


@functools.cache
def _is_installed(file: str, packages: tuple[str, ...]) -> bool:
    """Return whether a file is of one of these packages or of Python; without packages, of any that is installed."""
    if file.startswith("<frozen "):
        return True
    path = Path(file)
    # the package of a function is imported
    folders = [folder for package in packages or PACKAGES for folder in getattr(sys.modules.get(package), "__path__", ())]
    if any(path.is_relative_to(folder) for folder in folders):
        return True
    is_package = any(path.is_relative_to(place) for place in _find_places())
    return not packages if is_package else path.is_relative_to(sysconfig.get_path("stdlib"))


@functools.cache
def _find_places() -> frozenset[Path]:
    """Return the folders that packages are installed in: that of this Python, and where known ones really are.

    Those may be elsewhere: the user's own, the system's below a virtual environment, one that `pip install --target` filled.
    """
    places = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            distribution = importlib.metadata.distribution(_DISTRIBUTIONS.get(package, package))
            # without a record it is a checkout, perhaps beside the user's own files
            if distribution.read_text("RECORD") is not None:
                places.add(Path(str(distribution.locate_file(""))))
    return frozenset(places)


@functools.cache
def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return ""


def _digest_values(value: Any) -> str:
    tensor = torch.as_tensor(value)
    form = f"{tuple(tensor.shape)} {tensor.dtype}"
    if tensor.is_meta:
        return form
    raw = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{form} {hashlib.sha256(raw).hexdigest()}"


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _join(where: str, key: str) -> str:
    return f"{where}.{key}"
