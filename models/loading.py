"""From a name to a tokenizer, a configuration or a model, or to an error the user can act on.

A name is a hub id, a local folder or a .gguf file; a checkpoint (full weights or a PEFT adapter) may
lie over it. Stricter than transformers where its silence costs a run: weights that are missing from
the files, which it fills with noise and a warning, are an error here, and so is an empty tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

from errors import ConfigError, ModelError, ProtegeError

DEFAULT_LORA_ALPHA = 32.0  # constant in the rank, so that one learning rate serves all ranks (Tinker's choice)

_HUB_TIMEOUT_S = 10.0
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_ADAPTER_PATTERNS = ("adapter_model.safetensors", "adapter_model.bin")
# Files that hold a vocabulary. tokenizer_config.json alone does not: from it transformers builds a
# tokenizer of three special tokens that turns any text into nothing.
_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_FINGERPRINTED = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"}
_WHOLE_FILE_BYTES = 64 << 20
_STRIDE_BYTES, _BLOCK_BYTES = 1 << 20, 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from."""

    name: str  # hub id, local folder, or a .gguf file; the tokenizer always comes from here
    checkpoint: str | None = None  # local folder: full weights instead of `name`'s, or an adapter on them


def check_source(source: ModelSource) -> None:
    """Everything that can be said about a source before loading it. Raises ModelError.

    Reads a few bytes of local files; a hub id that is not in the cache costs one request.
    """
    path = _local_path(source.name)
    if path is None:
        _check_hub_id(source.name)
    elif path.is_file():
        _check_gguf(path)
    else:
        _check_folder(path)
        if source.checkpoint is None or is_adapter(source.checkpoint):
            _need_any(path, _WEIGHT_PATTERNS, "weights", "save the model there with save_pretrained")
    if source.checkpoint is not None:
        _check_checkpoint(source.checkpoint)


def is_adapter(checkpoint: str) -> bool:
    """Whether a checkpoint folder holds a PEFT adapter rather than full weights."""
    return (Path(checkpoint).expanduser() / "adapter_config.json").is_file()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of `source.name`, with its chat template if it has one. Raises ModelError."""
    check_source(source)
    where, gguf = _where(source.name)
    with _explained("tokenizer", source.name):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **gguf)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelError(
            f"{source.name} has no tokenizer: its vocabulary is empty. Looked for "
            f"{', '.join(_VOCABULARY_FILES)}; save the tokenizer there with save_pretrained"
        )
    return tokenizer


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration of the model that `load_model` would load. Raises ModelError."""
    check_source(source)
    if source.checkpoint is not None and not is_adapter(source.checkpoint):
        return _read_config(source.checkpoint)
    return _read_config(source.name)


def load_model(
    source: ModelSource, *, dtype: torch.dtype, device: torch.device, attn_implementation: str | None
) -> PreTrainedModel:
    """The model in eval mode on `device`, every weight read from the files, all of them trainable.

    A full checkpoint is loaded in place of `source.name`'s weights; an adapter is merged into them. To
    go on training an adapter, load the bare name and give the folder to `add_lora`. Raises ModelError.
    """
    check_source(source)
    if source.checkpoint is None:
        return _load_weights(source.name, dtype, device, attn_implementation)
    if not is_adapter(source.checkpoint):
        _check_same_family(source.name, source.checkpoint)
        return _load_weights(source.checkpoint, dtype, device, attn_implementation)
    model = _load_weights(source.name, dtype, device, attn_implementation)
    merged: Any = _attach_adapter(model, source.checkpoint, trainable=False)
    with _explained("adapter", source.checkpoint):
        model = merged.merge_and_unload()
    model.requires_grad_(True)  # PEFT froze the base; full fine-tuning may start from the merged weights
    return model


def add_lora(
    model: PreTrainedModel, rank: int, alpha: float | None = None, adapter: str | None = None, seed: int = 0
) -> PeftModel:
    """Wraps `model` (in place) with float32 LoRA on every linear layer but the head, without dropout.

    A new adapter depends on `seed` only and leaves the global generator alone; `adapter` goes on from a
    saved one, whose rank (and alpha, where given) must agree. Raises ModelError, ConfigError.
    """
    if rank < 1:
        raise ConfigError(f"lora_rank={rank}: expected at least 1 (0 means full fine-tuning, without LoRA)")
    if adapter is not None:
        _check_checkpoint(adapter)
        saved = _read_adapter_config(adapter)
        if saved.r != rank or (alpha is not None and saved.lora_alpha != alpha):
            wanted = f"rank {rank}" if alpha is None else f"rank {rank} and alpha {alpha}"
            raise ModelError(
                f"{adapter} has rank {saved.r} and alpha {saved.lora_alpha}, asked for {wanted}; "
                f"set lora_rank={saved.r} or start a new adapter"
            )
        return _attach_adapter(model, adapter, trainable=True)
    with torch.random.fork_rng(devices=[]), _explained("LoRA layers", model.name_or_path or "the model"):
        torch.manual_seed(seed)  # PEFT draws on the CPU, whatever device the model is on
        return get_peft_model(model, _lora_config(model, rank, alpha))  # type: ignore[return-value]


def source_fingerprint(source: ModelSource) -> str:
    """16 hex digits that say which weights, configuration and tokenizer a source stands for.

    From file contents, so any route to a folder, and any copy of it, gives the same; a hub id stands for
    itself. Files over 64 MiB are sampled, 4 KiB in every MiB: enough to tell two training steps apart.
    """
    check_source(source)
    digest = hashlib.sha256()
    for part in (source.name, source.checkpoint or ""):
        path = _local_path(part) if part else None
        digest.update(b"\0part\0" + (part.encode() if path is None else b""))
        for file in _fingerprinted_files(path) if path is not None else []:
            _hash_file(digest, file)
    return digest.hexdigest()[:16]


def estimate_memory(
    config: PreTrainedConfig, *, dtype: torch.dtype, lora_rank: int = 0, trained: bool = True
) -> dict[str, float]:
    """Bytes of weights, gradients and AdamW's two moments, from shapes alone; activations not included.

    `trained=False` is a teacher. Gradients and moments take the dtype of the weights they belong to.
    """
    name = config.name_or_path or config.model_type
    with _explained("architecture", name), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if trained and lora_rank > 0:
            model = get_peft_model(model, _lora_config(model, lora_rank, None), low_cpu_mem_usage=True)
    weights = float(sum(p.numel() * p.element_size() for p in model.parameters()))
    gradients = float(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
    if not trained:
        gradients = 0.0
    parts = {"parameters": weights, "gradients": gradients, "optimizer": 2 * gradients}
    return parts | {"total": sum(parts.values())}


# ---- names and folders


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".gguf")


def _local_path(name: str) -> Path | None:
    """The absolute path that a name means, None for a hub id. Raises ModelError for a path to nothing."""
    path = Path(name).expanduser()
    if name and path.exists():
        return path.absolute()
    if _looks_like_path(name):
        kind = "file" if name.endswith(".gguf") else "folder"
        raise ModelError(f"{name}: no such {kind} ({path.absolute()}); give an existing one, or a hub id")
    return None


def _where(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a name: a folder or hub id, and the keyword for a .gguf file."""
    path = _local_path(name)
    if path is None:
        return name, {}
    return (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(path), {})


def _check_hub_id(name: str) -> None:
    try:
        validate_repo_id(name)
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        # One short request: left to itself transformers retries for half a minute, once per file.
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # a missing repository, no network and no permission share no base class
        raise ModelError(
            f"{name!r} is no folder here, and the Hugging Face hub does not give it ({_cause(error)}); "
            "check the spelling, or give a local folder or a .gguf file"
        ) from error


def _check_gguf(path: Path) -> None:
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is a file; expected a model folder, a .gguf file or a hub id")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file (it does not start with 'GGUF'); download it again")


def _check_folder(path: Path) -> None:
    """A base model's folder: configuration and tokenizer."""
    if is_adapter(str(path)):
        base = _read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise ModelError(
            f"{path} is a PEFT adapter, not a model; give its base ({base}) as the model and this folder "
            "as the checkpoint"
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json, so it is not a model folder{_inner_models(path)}")
    _need_any(path, _VOCABULARY_FILES, "tokenizer", "save the tokenizer there with save_pretrained")


def _check_checkpoint(checkpoint: str) -> None:
    path = Path(checkpoint).expanduser().absolute()
    if not path.is_dir():
        raise ModelError(f"{checkpoint}: no such checkpoint folder ({path})")
    if is_adapter(checkpoint):
        _need_any(path, _ADAPTER_PATTERNS, "adapter weights", "save the adapter again")
    elif not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has neither config.json nor adapter_config.json, so it is no checkpoint{_inner_models(path)}"
        )
    else:
        _need_any(path, _WEIGHT_PATTERNS, "weights", "name a complete checkpoint")


def _need_any(path: Path, patterns: tuple[str, ...], what: str, way_out: str) -> None:
    if not any(True for pattern in patterns for _ in path.glob(pattern)):
        raise ModelError(f"{path} has no {what}: looked for {', '.join(patterns)}; {way_out}")


def _inner_models(path: Path) -> str:
    inner = sorted(p.parent.name for p in path.glob("*/*config.json") if "config.json" in p.name[-19:])
    return f"; it contains {', '.join(dict.fromkeys(inner))}: name one of those" if inner else ""


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {_cause(error)}") from error


# ---- loading


def _read_config(name: str) -> PreTrainedConfig:
    where, gguf = _where(name)
    with _explained("configuration", name):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **gguf)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{name} is of type {config.model_type!r}, which is not a causal language model")
    return config


def _check_same_family(name: str, checkpoint: str) -> None:
    """The tokenizer comes from `name`, so a checkpoint of another model would train on nonsense."""
    base, over = _read_config(name).get_text_config(), _read_config(checkpoint).get_text_config()
    for key in ("model_type", "vocab_size"):
        if getattr(base, key) != getattr(over, key):
            raise ModelError(
                f"checkpoint {checkpoint} has {key} {getattr(over, key)}, but {name} has "
                f"{getattr(base, key)}; give the model that the checkpoint was trained from"
            )


def _load_weights(
    name: str, dtype: torch.dtype, device: torch.device, attn_implementation: str | None
) -> PreTrainedModel:
    config = _read_config(name)  # refuses what is no causal language model before any weight is read
    where, gguf = _where(name)
    options: dict[str, Any] = dict(gguf)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if gguf and hasattr(transformers, "GgufConfig"):  # older releases always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif device.type != "cpu":
        options["device_map"] = {"": device}  # straight to the device, without a copy in host memory
    with _explained("weights", name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name; transformers' error names nothing
            **options,
        )
        model, info = loaded
        model = model.to(device)
    _check_loaded(name, info)
    if gguf:
        _forget_quantisation(model)
        _retie(model)
    return model.eval()


def _check_loaded(name: str, info: dict) -> None:
    if info["mismatched_keys"]:
        key, found, expected = min(info["mismatched_keys"])
        raise ModelError(
            f"{name}: {len(info['mismatched_keys'])} weights have another shape than config.json says, such "
            f"as {key}: {list(found)} in the file, expected {list(expected)}"
        )
    if info["missing_keys"]:
        raise ModelError(
            f"{name}: the files lack {len(info['missing_keys'])} of the model's weights, such as "
            f"{_some(info['missing_keys'])}; the folder is incomplete, or its config.json is another model's"
        )
    if info["unexpected_keys"]:
        unused = info["unexpected_keys"]
        _log.warning("%s: %d weights in the files are not used, such as %s", name, len(unused), _some(unused))


def _forget_quantisation(model: PreTrainedModel) -> None:
    """A dequantised model must not say it is quantised: save_pretrained would refuse, or write it down."""
    for mark in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(mark, None)
    model.__dict__["is_quantized"] = False
    model.config.__dict__.pop("quantization_config", None)


def _retie(model: PreTrainedModel) -> None:
    """GGUF files may repeat a tied embedding as the head; one matrix trained as two is another model."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is None or head.weight is embedding.weight or not torch.equal(head.weight, embedding.weight):
        return
    model.config.get_text_config().tie_word_embeddings = True
    model.config.tie_word_embeddings = True
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


# ---- adapters


def _lora_config(model: PreTrainedModel, rank: int, alpha: float | None) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=DEFAULT_LORA_ALPHA if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's layers
    )


def _read_adapter_config(folder: str) -> LoraConfig:
    with _explained("adapter configuration", folder):
        config = PeftConfig.from_pretrained(str(Path(folder).expanduser()))
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder} is a {config.peft_type} adapter; only LoRA adapters are supported")
    config.lora_dropout = 0.0  # the sampler, the teacher and the learner must see one and the same policy
    return config


def _attach_adapter(model: PreTrainedModel, folder: str, *, trainable: bool) -> PeftModel:
    config, path = _read_adapter_config(folder), str(Path(folder).expanduser())
    with torch.random.fork_rng(devices=[]), _explained("adapter", folder):
        saved = load_peft_weights(path, device="cpu")
        wrapped = PeftModel.from_pretrained(model, path, is_trainable=trainable, config=config)
        expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # PEFT only warns about missing keys and says nothing of surplus ones.
    missing = expected.keys() - saved.keys()
    surplus = {key for key in saved.keys() - expected.keys() if "lora_" in key}
    if missing or surplus:
        raise ModelError(
            f"adapter {folder} was made for another model than {model.name_or_path}: "
            + (f"it lacks {_some(missing)}" if missing else f"the model has no place for {_some(surplus)}")
        )
    base: Any = wrapped.get_base_model()
    head = base.get_output_embeddings()
    if trainable and isinstance(head, BaseTunerLayer | ModulesToSaveWrapper):
        raise ModelError(f"adapter {folder} adapts the output head, which is not supported; merge it first")
    return wrapped


# ---- fingerprints


def _fingerprinted_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.iterdir() if p.suffix in _FINGERPRINTED and p.is_file())


def _hash_file(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"\0{file.suffix if file.suffix == '.gguf' else file.name}\0{size}\0".encode())
    with file.open("rb") as stream:
        if size <= _WHOLE_FILE_BYTES:
            digest.update(stream.read())
            return
        for offset in range(0, size, _STRIDE_BYTES):
            stream.seek(offset)
            digest.update(stream.read(_BLOCK_BYTES))


# ---- errors and noise


@contextmanager
def _explained(what: str, name: str) -> Iterator[None]:
    """Turns whatever the libraries raise about a model's files into a ModelError of one sentence."""
    try:
        with _quiet():
            yield
    except ProtegeError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, safetensors a class of its own
        raise ModelError(f"cannot load the {what} of {name}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The first sentence of an error's text, short enough for a terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    sentence = text.split(". ")[0].rstrip(".")[:300]
    telling = isinstance(error, OSError | ValueError | RuntimeError) or type(error) is Exception
    return sentence if telling else f"{type(error).__name__}: {sentence}"


def _some(keys: set[str]) -> str:
    return ", ".join(sorted(keys)[:3])


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no load reports: what matters in them is raised or logged here."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hub_bars, tqdm = not are_progress_bars_disabled(), gguf_reader.tqdm  # type: ignore[attr-defined]
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    disable_progress_bars()
    gguf_reader.tqdm = partial(tqdm, disable=True)  # type: ignore[attr-defined]  # it knows no switch
    try:
        yield
    finally:
        gguf_reader.tqdm = tqdm  # type: ignore[attr-defined]
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
