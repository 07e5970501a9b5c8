"""Checkpoints in transformers' layout: local, safetensors only, and never a silent substitute for a lost weight."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from models import moe_bert, vmoe
from models.adapters import adapted, lets_experts_be_chosen
from models.families import family, known_type
from models.own_code import CONFIG, OPTION, files_of, own_class, own_classes
from models.stored_names import parameter_names
from models.tensor_files import AGAIN, INDEX, WEIGHTS, StoredTensor, read_tensors
from moe_spec.errors import UserError
from moe_spec.files import inside
from moe_spec.identity import checkpoint_weights
from moe_spec.record import Json, parse_object

AUTO_CLASSES: Mapping[str, type] = {
    "Mistral4ForCausalLM": transformers.AutoModelForImageTextToText,  # where transformers has it
    "SwitchTransformersForConditionalGeneration": transformers.AutoModelForSeq2SeqLM,
    "ForCausalLM": transformers.AutoModelForCausalLM,
    "ForConditionalGeneration": transformers.AutoModelForImageTextToText,
    "ForImageClassification": transformers.AutoModelForImageClassification,
    "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "ForTokenClassification": transformers.AutoModelForTokenClassification,
}
"""How an entry of config.architectures ends, and the auto class that it asks for; any other gets AutoModel."""

FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What safetensors calls the dtypes of weights."""

_NO_CHECKPOINT = (OSError, ValueError, TypeError, KeyError, RuntimeError, StrictDataclassError)
"""What transformers raises about files that do not fit together."""

_NO_ARCHITECTURE = (ArithmeticError, AssertionError, AttributeError, IndexError)
"""What falls out of it where config.json has numbers that make no model."""

_UNFIT = "config.json and the weights must describe the same model; get the checkpoint again"
_UNFIT_NUMBERS = "look at the numbers in config.json; --debug shows where it failed"
_UNFIT_CODE = (
    f"its own code may be for another transformers than {transformers.__version__}; --debug shows where it failed"
)


def load_model(
    directory: Path,
    dtype: torch.dtype | None = torch.float32,
    known: Callable[[str], object] = family,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint, in eval mode, on the CPU; ``models.spread`` has models larger than memory.

    Args:
        directory: config.json and safetensors weights.
        dtype: what floating-point weights are cast to; None leaves them as they are stored.
        known: refuses a model_type that is not expected; if not given, one without experts.
        trust_remote_code: run the Python files that config.json names (`own_code`).

    Raises:
        UserError: no checkpoint, pickled, cut or quantised weights, an unknown family, code that is not trusted, or
            weights that do not fill the model that config.json describes.
    """
    config = load_config(directory, known, trust_remote_code=trust_remote_code)
    stored_tensors(directory)  # every file is complete
    with quiet(), _explained(directory, trust_remote_code=trust_remote_code), adapted(config.model_type):
        model: PreTrainedModel
        own = _own_model(directory, trust_remote_code=trust_remote_code)
        model, report = (own or _auto_class(directory)).from_pretrained(
            directory,
            config=config,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,  # of what else there is: a class of the checkpoint's own is imported by now
            output_loading_info=True,
        )
    lost = sorted(report["missing_keys"])
    if lost:  # transformers fills them with random numbers
        raise UserError(
            f"{directory} lacks {len(lost)} weights that its config.json asks for, the first is {lost[0]!r}",
            hint=AGAIN,
        )
    return model if own is None else _let_experts_be_chosen(model)


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """Write config.json and safetensors weights, in the layout that the family's checkpoints have."""
    with quiet(), adapted(model.config.model_type):
        model.save_pretrained(directory)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors keeps it to its owner


def cast_like(model: PreTrainedModel, directory: Path, *, trust_remote_code: bool = False) -> None:
    """Give the weights of ``model``, which may have lost experts, the dtypes that they have in a checkpoint's files.

    Raises:
        UserError: ``directory`` is no checkpoint, or not one of this model.
    """
    tensors = stored_tensors(directory)
    names = parameter_names(load_skeleton(directory, trust_remote_code=trust_remote_code), tensors, directory)
    dtypes = {name: FLOATS.get(tensors[stored].dtype) for stored, name in names.items()}
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        weight.data = weight.data.to(dtypes.get(name) or weight.dtype)


def load_skeleton(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The modules of a checkpoint without its weights, on torch's meta device: for looking, not for running.

    Raises:
        UserError: no checkpoint, pickled or quantised weights, an unknown family, or code that is not trusted.
    """
    config = load_config(directory, trust_remote_code=trust_remote_code)
    explained = _explained(directory, trust_remote_code=trust_remote_code)
    with quiet(), explained, adapted(config.model_type), torch.device("meta"):
        return _new(config, directory, trust_remote_code=trust_remote_code)


def load_empty(directory: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint in eval mode, without values for its parameters; buffers are those of a new model.

    Raises:
        UserError: no checkpoint, pickled or quantised weights, an unknown family, or code that is not trusted.
        ModuleNotFoundError: accelerate is not installed.
    """
    from accelerate import init_empty_weights

    config = load_config(directory, trust_remote_code=trust_remote_code)
    explained = _explained(directory, trust_remote_code=trust_remote_code)
    with quiet(), explained, adapted(config.model_type), init_empty_weights(include_buffers=False):
        model = _new(config, directory, trust_remote_code=trust_remote_code, dtype=dtype)
    model.tie_weights()
    model.train(False)
    return model


def load_config(directory: Path, known: Callable[[str], object] = family, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint of a known family, or whatever else is ``known``.

    Raises:
        UserError: no checkpoint, pickled or quantised weights, weights under a name of their own, an unknown family, or
            code that is not trusted.
    """
    checkpoint_weights(directory)
    path, values = directory / "config.json", _values(directory)
    if not isinstance(values.get("model_type"), str):
        raise UserError(f"{path} names no model_type", hint="give a directory in transformers' layout")
    vmoe.register()
    moe_bert.register()
    own = _own_config(directory, values["model_type"], trust_remote_code=trust_remote_code)
    if own is None:
        known(values["model_type"])
    if values.get("quantization_config") is not None:
        raise UserError(
            f"{directory} holds quantised weights", hint="give the unquantised checkpoint; precision is chosen later"
        )
    if values.get("transformers_weights") is not None:
        raise UserError(
            f"{path} names the file of its weights", hint=f"call it {WEIGHTS}, and remove transformers_weights"
        )
    with quiet(), _explained(directory, trust_remote_code=trust_remote_code):
        if own is None:
            return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        config = own_class(directory, own).from_pretrained(directory, local_files_only=True)
    known(known_type(config))
    return config


def own_code(directory: Path) -> dict[str, str]:
    """The Python files of a checkpoint that run where ``trust_remote_code`` is given, with their sha256; mostly none.

    Raises:
        UserError: no config.json, code of another repository, or a file that is not in the directory.
    """
    return files_of(directory, own_classes(directory, (CONFIG, _auto_class(directory).__name__)))


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Where every tensor of a checkpoint lies, by its name in the file; transformers reads the same files.

    Raises:
        UserError: a file of weights is missing, cut, or named outside of ``directory``.
    """
    whole = directory / WEIGHTS
    paths = [whole] if whole.is_file() else _shards(directory)  # so does transformers choose between them
    return {name: tensor for path in paths for name, tensor in read_tensors(path).items()}


def _values(directory: Path) -> Json:
    path = directory / "config.json"
    return parse_object(path, path.read_bytes(), AGAIN)


def _auto_class(directory: Path) -> Any:
    architectures = _values(directory).get("architectures")
    for architecture in architectures if isinstance(architectures, list) else ():
        for suffix, auto_class in AUTO_CLASSES.items():
            if str(architecture).endswith(suffix):
                return auto_class
    return transformers.AutoModel


def _own_config(directory: Path, model_type: str, *, trust_remote_code: bool) -> str | None:
    """What ``auto_map`` names for the config, where that is to be run.

    Raises:
        UserError: it is not trusted, and transformers has nothing in its place.
    """
    if trust_remote_code:
        return own_classes(directory, (CONFIG,)).get(CONFIG)
    if model_type not in CONFIG_MAPPING and (files := own_code(directory)):
        raise UserError(
            f"{directory} is a {model_type!r}, which code of its own defines: {', '.join(files)}",
            hint=f"read these files; where you trust them, {OPTION} runs them (in Python trust_remote_code=True)",
        )
    return None


def _own_model(directory: Path, *, trust_remote_code: bool) -> Any:
    """The class that ``auto_map`` names for the model, where that is to be run."""
    name = _auto_class(directory).__name__
    reference = own_classes(directory, (name,)).get(name) if trust_remote_code else None
    return None if reference is None else own_class(directory, reference)


def _new(config: Any, directory: Path, *, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    own = _own_model(directory, trust_remote_code=trust_remote_code)
    if own is not None:
        return _let_experts_be_chosen(own._from_config(config, **options))
    model: PreTrainedModel = _auto_class(directory).from_config(config, trust_remote_code=False, **options)
    return model


def _let_experts_be_chosen(model: PreTrainedModel) -> PreTrainedModel:
    """Transformers looks for the experts' decorator where the model's class is: own code may have it elsewhere."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            vars(part)["_can_set_experts_implementation"] = lets_experts_be_chosen
    return model


def _shards(directory: Path) -> list[Path]:
    """The files that the index names, each of which exists in ``directory``."""
    index = directory / INDEX
    if not index.is_file():
        raise UserError(f"{directory} has neither {WEIGHTS} nor {INDEX}", hint="name its weights as transformers does")
    weight_map = parse_object(index, index.read_bytes(), AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} maps no weights to files", hint=AGAIN)
    names = sorted(set(weight_map.values()))
    # a plain name may be a link, as all are in the cache of huggingface_hub
    paths = [directory / name if Path(name).name == name else inside(directory, name, index) for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing, {index.name} names it", hint=AGAIN)
    return paths


@contextlib.contextmanager
def _explained(directory: Path, *, trust_remote_code: bool = False) -> Iterator[None]:
    # nobody knows what foreign code raises
    expected = (Exception,) if trust_remote_code else (*_NO_CHECKPOINT, *_NO_ARCHITECTURE)
    try:
        yield
    except UserError:
        raise
    except expected as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else None  # it says what was refused
        reason = str(cause or error).strip().splitlines()
        unfit = _UNFIT_CODE if trust_remote_code else _UNFIT_NUMBERS
        raise UserError(
            f"{directory} cannot be loaded: {reason[0] if reason else type(error).__name__}",
            hint=_UNFIT if isinstance(error, _NO_CHECKPOINT) else unfit,
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' load reports and progress bars: what matters in them is an error here."""
    reports: Any = transformers.utils.logging  # untyped
    verbosity, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    reports.set_verbosity(reports.CRITICAL)
    reports.disable_progress_bar()
    accelerate.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        reports.set_verbosity(verbosity)
        accelerate.setLevel(level)
        if bars:
            reports.enable_progress_bar()
