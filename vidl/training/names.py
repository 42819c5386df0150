"""Names of the Hugging Face Hub in fields that name files."""

import re
from collections.abc import Sequence
from pathlib import Path

# A repository as people write it: bert-base-uncased, google-bert/bert-base-uncased, hf-hub:timm/...
REPOSITORY = re.compile(r"(hf-hub:)?([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)")
FILES = (".safetensors", ".pt", ".pth", ".bin", ".json", ".txt", ".yaml")
TOKENIZER, WEIGHTS = ("tokenizer.json", "vocab.txt"), ("model.safetensors", "pytorch_model.bin")


def local(value: str, field: str, files: Sequence[str], *, marked: bool = False) -> str:
    """The file that a field names: its value if that is a path, else a file of the Hub.

    Args:
        value: a path, or a repository such as "bert-base-uncased" or "hf-hub:timm/vit_...".
        field: for the error.
        files: names of the file in the repository; the first that exists counts.
        marked: only values that begin with "hf-hub:" are repositories.

    Raises:
        ValueError: the Hub does not give the file, for the reason given; for example there is no
            network and the file is not in the cache.
    """
    match = REPOSITORY.fullmatch(value)
    if match is None or Path(value).exists() or Path(value).suffix in FILES:
        return value
    if marked and match[1] is None:
        return value
    from huggingface_hub import hf_hub_download

    reason = ""
    for name in files:
        try:
            return hf_hub_download(match[2], name)
        except Exception as error:  # of the network, the Hub, or offline mode
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ValueError(
        f"need {field} as a file, or as a repository of the Hub with {' or '.join(files)}: "
        f"{value!r} is no file, and the Hub does not give it ({reason}). Without a network, run "
        f"`hf download {match[2]}` where there is one, or name a file"
    )
