"""Make question_answering.json: what the question-answering pipeline of transformers 4 answers; 5 has none.

The models are built with the transformers of the tests and asked with the older one. From the repository's
root, with two folders that are empty at first:

    python -m tests.goldens.make_question_answering build MODELS
    pip install --target OLD --no-deps 'transformers==4.57.*' 'huggingface_hub<1' 'tokenizers<0.23'
    PYTHONPATH=OLD python -m tests.goldens.make_question_answering ask MODELS

No weights are kept: the tests build the same models again, and compare their fingerprints with the golden's.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).with_name("question_answering.json")
_ASKED_WITH = ("transformers", "tokenizers", "huggingface_hub", "torch", "numpy")

_SHORT = "The ship left Oslo on 3 May with 40 men, and came home in June."
_LONG = (
    "The old mill by the river was built of stone. For many years it made flour for the whole town. In the last "
    "war it burned, and nobody paid to have it made new. Two sisters, Anna and Ruth, bought the land in 1952. "
    "They planted apple trees, and sold the fruit at the market each autumn. When Ruth died, Anna gave the garden "
    "to the school, which still keeps it."
)
# ruff: noqa: RUF001 - letters that look like others are what is tested.
_UNICODE = "Le café d'Ærøskøbing ouvre à 7 h; 東京の店 は 9 h. Ελλάδα: ναι. Cafe\u0301 ﬁn."
_EMOJI = "We won 🎉🎉 3:1 👩‍👩‍👧 in Rome 🇮🇹, and lost 0:2 at home 😢."
_LINES = "  Name:\tAnna \n\n\n   Town:  Oslo\r\n\u00a0 Year: 1952   \n"
_REPEATED = "Oslo is far. OSLO is cold. We like oslo, oslo and Oslo."
_TAGGED = "He wrote [SEP] or </s> there, and [MASK] or <mask> here."

# Name, what is given to the pipeline, settings.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("short context", {"question": "When did the ship leave?", "context": _SHORT}, {}),
    ("long context", {"question": "Who bought the land?", "context": _LONG}, {}),
    ("long context, little overlap", {"question": "Who bought the land?", "context": _LONG}, {"doc_stride": 3}),
    ("long context, no overlap", {"question": "Who bought the land?", "context": _LONG}, {"doc_stride": 0}),
    ("long context, short windows", {"question": "What burned?", "context": _LONG}, {"max_seq_len": 30}),
    ("long context, batched", {"question": "What burned?", "context": _LONG}, {"batch_size": 3}),
    ("three answers", {"question": "How many men?", "context": _SHORT}, {"top_k": 3}),
    ("three answers of many windows", {"question": "What did they sell?", "context": _LONG}, {"top_k": 3}),
    ("parts of words", {"question": "Who?", "context": _LONG}, {"align_to_words": False}),
    ("parts of words, three", {"question": "Who?", "context": _SHORT}, {"align_to_words": False, "top_k": 3}),
    ("one token", {"question": "Where?", "context": _SHORT}, {"max_answer_len": 1, "align_to_words": False}),
    ("long answers", {"question": "Where?", "context": _LONG}, {"max_answer_len": 40}),
    ("no answer", {"question": "Why?", "context": "No."}, {"handle_impossible_answer": True}),
    (
        "no answer among others",
        {"question": "Why?", "context": "Anna went home."},
        {"handle_impossible_answer": True, "top_k": 11},
    ),
    (
        # As many answers as the last window has tokens: the old pipeline fills a longer list with spans that end
        # before they begin.
        "no answer in two windows",
        {"question": "Why?", "context": "No. Not now. Not here. Not today."},
        {
            "handle_impossible_answer": True,
            "top_k": 8,
            "max_seq_len": 14,
            "doc_stride": 3,
            "max_answer_len": 1,
            "align_to_words": False,
        },
    ),
    ("unicode", {"question": "Où est le café? 東京?", "context": _UNICODE}, {"top_k": 2}),
    ("emoji", {"question": "Who won 🎉?", "context": _EMOJI}, {"top_k": 2}),
    ("white space", {"question": " Which\n town? ", "context": _LINES}, {"top_k": 2}),
    ("the same answer many times", {"question": "Where?", "context": _REPEATED}, {"top_k": 4}),
    ("special tokens spelt out", {"question": "Where is it?", "context": _TAGGED}, {"top_k": 2}),
    (
        "lists",
        {"question": ["Who?", "When?", "Where to?"], "context": [_SHORT, _LONG, _EMOJI]},
        {},
    ),
    ("one context for all", {"question": ["Who?", "When?"], "context": _LONG}, {"top_k": 2}),
    ("dict", {"inputs": {"question": "Who bought the land?", "context": _LONG}}, {"max_answer_len": 3}),
    (
        "list of dicts",
        {"inputs": [{"question": "Who?", "context": _SHORT}, {"question": "When?", "context": _LONG}]},
        {"batch_size": 4},
    ),
    ("list of one", {"inputs": [{"question": "Who?", "context": _SHORT}]}, {}),
]


def fingerprint(folder: Path) -> dict[str, Any]:
    """Return what tells one saved model from another, the same whatever machine built it.

    Processors differ in a random number's last digits, so that weights are summed, each with a weight of its own:
    to be compared with a tolerance.
    """
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    flat = np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    return {
        "weights": flat.size,
        "weighted_sum": float(flat @ np.cos(np.arange(flat.size))),
        "vocabulary_sha256": hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest(),
    }


def build(models: Path) -> None:
    from compileflow.spec import HfTask
    from tests.models import ARCHITECTURES, build_model

    for architecture in ARCHITECTURES:
        build_model(models / architecture, HfTask.QUESTION_ANSWERING, architecture=architecture)


def ask(models: Path) -> None:
    from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerFast, pipeline

    folders = sorted(path for path in models.iterdir() if path.is_dir())
    answers: dict[str, dict[str, Any]] = {name: {} for name, _, _ in CASES}
    for folder in folders:
        model = AutoModelForQuestionAnswering.from_pretrained(folder)
        # The tokenizer's class is named as transformers 5 names it.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        asked = pipeline("question-answering", model=model, tokenizer=tokenizer)
        for name, given, settings in CASES:
            result = asked(given["inputs"], **settings) if "inputs" in given else asked(**given, **settings)
            answers[name][folder.name] = result
    golden = {
        "asked_with": {name: version(name) for name in _ASKED_WITH},
        "models": {folder.name: fingerprint(folder) for folder in folders},
        "cases": [
            {"name": name, "given": given, "settings": settings, "answers": answers[name]}
            for name, given, settings in CASES
        ],
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    {"build": build, "ask": ask}[sys.argv[1]](Path(sys.argv[2]))
