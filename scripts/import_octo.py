"""Turns a released Octo checkpoint into a directory of this project, and says what is in it.

    python scripts/import_octo.py hf://rail-berkeley/octo-small-1.5 runs/octo-small --text-model t5-base/spiece.model
    python scripts/import_octo.py gs://bucket/finetuned runs/mine --step 5000
    python scripts/import_octo.py path/to/checkpoint hf://me/my-octo

The model behaves as it was trained, deviations of its masks included (`octo_compat`); `finetune.py` and
`Policy.load_pretrained` read the result, and the latter also reads the release itself. Releases name T5's tokenizer and
do not hold it: without --text-model the policy takes goal images and refuses texts.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import sys
from pathlib import Path

import octo_like
from octo_like.policy.locations import LocationError
from octo_like.policy.pretrained import PretrainedError, read_json


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the release: a folder, gs://bucket/path or hf://owner/name[@revision]")
    parser.add_argument("target", help="where the policy goes: a folder, gs://bucket/path or hf://owner/name")
    parser.add_argument("--step", type=int, help="of a release that holds several; default: the newest")
    parser.add_argument("--text-model", help="sentencepiece model of the language encoder (T5's spiece.model)")
    parser.add_argument("--t5-config", type=Path, help="JSON with the fields of T5Config, for a T5 of unusual sizes")
    flags = parser.parse_args(argv)
    t5 = read_json(flags.t5_config) if flags.t5_config else None
    policy = octo_like.Policy.load_pretrained(flags.source, step=flags.step, text_model=flags.text_model, t5=t5)
    policy.push(flags.target, message=f"Import {flags.source}")
    print(policy.get_pretty_spec())
    if policy.batch_spec.language_length is not None and policy.text_tokenizer is None:
        print("\nno --text-model was given: this policy takes goal images and token ids, and refuses texts")
    print(f"\nwritten to {flags.target}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (PretrainedError, LocationError, FileNotFoundError) as error:
        sys.exit(f"import_octo.py: error: {error}")
