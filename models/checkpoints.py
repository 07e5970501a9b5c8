"""Checkpoints in transformers' layout: local, safetensors only, and never a silent substitute for a lost weight."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel

from models import moe_bert, vmoe
from models.adapters import adapted
from models.families import family
from models.stored_names import parameter_names
from models.tensor_files import AGAIN, INDEX, WEIGHTS, StoredTensor, read_tensors
from moe_spec.errors import UserError
from moe_spec.files import inside
from moe_spec.identity import checkpoint_weights
from moe_spec.record import parse_object

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

_FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What safetensors calls the dtypes of weights."""

_NO_CHECKPOINT = (OSError, ValueError, TypeError, KeyError, RuntimeError, StrictDataclassError)
"""What transformers raises about files that do not fit together."""


def load_model(
    directory: Path, dtype: torch.dtype | None = torch.float32, known: Callable[[str], object] = family
) -> PreTrainedModel:
    """The model of a checkpoint, in eval mode, on the CPU; ``models.spread`` has models larger than memory.

    Args:
        directory: config.json and safetensors weights.
        dtype: what floating-point weights are cast to; None leaves them as they are stored.
        known: refuses a model_type that is not expected; if not given, one without experts.

    Raises:
        UserError: no checkpoint, pickled, cut or quantised weights, an unknown family, or weights that do not fill
            the model that config.json describes.
    """
    config = load_config(directory, known)
    stored_tensors(directory)  # every file is complete
    with quiet(), _explained(directory), adapted(config.model_type):
        model: PreTrainedModel
        model, report = _auto_class(config).from_pretrained(
            directory,
            config=config,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    lost = sorted(report["missing_keys"])
    if lost:  # transformers fills them with random numbers
        raise UserError(
            f"{directory} lacks {len(lost)} weights that its config.json asks for, the first is {lost[0]!r}",
            hint=AGAIN,
        )
    return model


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """Write config.json and safetensors weights, in the layout that the family's checkpoints have."""
    with quiet(), adapted(model.config.model_type):
        model.save_pretrained(directory)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors keeps it to its owner


def cast_like(model: PreTrainedModel, directory: Path) -> None:
    """Give the weights of ``model``, which may have lost experts, the dtypes that they have in a checkpoint's files.

    Raises:
        UserError: ``directory`` is no checkpoint, or not one of this model.
    """
    tensors = stored_tensors(directory)
    names = parameter_names(load_skeleton(directory), tensors, directory)
    dtypes = {name: _FLOATS.get(tensors[stored].dtype) for stored, name in names.items()}
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        weight.data = weight.data.to(dtypes.get(name) or weight.dtype)


def load_skeleton(directory: Path) -> PreTrainedModel:
    """The modules of a checkpoint without its weights, on torch's meta device: for looking, not for running.

    Raises:
        UserError: no checkpoint, pickled or quantised weights, or an unknown family.
    """
    config = load_config(directory)
    with quiet(), _explained(directory), adapted(config.model_type), torch.device("meta"):
        skeleton: PreTrainedModel = _auto_class(config).from_config(config)
    return skeleton


def load_empty(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint in eval mode, without values for its parameters; buffers are those of a new model.

    Raises:
        UserError: no checkpoint, pickled or quantised weights, or an unknown family.
        ModuleNotFoundError: accelerate is not installed.
    """
    from accelerate import init_empty_weights

    config = load_config(directory)
    with quiet(), _explained(directory), adapted(config.model_type), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = _auto_class(config).from_config(config, dtype=dtype)
    model.tie_weights()
    model.train(False)
    return model


def load_config(directory: Path, known: Callable[[str], object] = family) -> Any:
    """The transformers config of a checkpoint of a known family, or whatever else is ``known``.

    Raises:
        UserError: no checkpoint, pickled or quantised weights, weights under a name of their own, or an unknown family.
    """
    checkpoint_weights(directory)
    path = directory / "config.json"
    values = parse_object(path, path.read_bytes(), AGAIN)
    if not isinstance(values.get("model_type"), str):
        raise UserError(f"{path} names no model_type", hint="give a directory in transformers' layout")
    known(values["model_type"])
    if values.get("quantization_config") is not None:
        raise UserError(
            f"{directory} holds quantised weights", hint="give the unquantised checkpoint; precision is chosen later"
        )
    if values.get("transformers_weights") is not None:
        raise UserError(
            f"{path} names the file of its weights", hint=f"call it {WEIGHTS}, and remove transformers_weights"
        )
    vmoe.register()
    moe_bert.register()
    with quiet(), _explained(directory):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Where every tensor of a checkpoint lies, by its name in the file; transformers reads the same files.

    Raises:
        UserError: a file of weights is missing, cut, or named outside of ``directory``.
    """
    whole = directory / WEIGHTS
    paths = [whole] if whole.is_file() else _shards(directory)  # so does transformers choose between them
    return {name: tensor for path in paths for name, tensor in read_tensors(path).items()}


def _auto_class(config: Any) -> Any:
    for architecture in config.architectures or ():
        for suffix, auto_class in AUTO_CLASSES.items():
            if architecture.endswith(suffix):
                return auto_class
    return transformers.AutoModel


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
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except _NO_CHECKPOINT as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{directory} cannot be loaded: {reason[0] if reason else type(error).__name__}",
            hint="config.json and the weights must describe the same model; get the checkpoint again",
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
