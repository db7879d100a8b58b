"""Trains the small sentencepiece model of the built-in world, or one for your own instructions.

    python scripts/train_tokenizer.py    # rewrites octo_like/common/assets/tabletop.model
    python scripts/train_tokenizer.py --texts my_instructions.txt --output my.model --vocab_size 512

Training is deterministic: one thread, sorted unique texts.
"""

import argparse
import io
import sys

# Every printable letter a user may type is a piece of its own, so unseen words are spelled instead of lost.
REQUIRED_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-_/()+&%"


def train(texts: list[str], vocab_size: int) -> bytes:
    """Serialised sentencepiece model (pad 0, </s> 1, <unk> 2; lower-casing) of at most `vocab_size` pieces."""
    import sentencepiece

    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted({text.strip().lower() for text in texts if text.strip()})),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        required_chars=REQUIRED_CHARACTERS,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", help="text file with one instruction a line (default: all tabletop instructions)")
    parser.add_argument("--output", help="where to write the model (default: the built-in asset)")
    parser.add_argument("--vocab_size", type=int, default=192)
    args = parser.parse_args()

    from octo_like.common.text import BUILTIN, TextTokenizer

    if args.texts:
        with open(args.texts, encoding="utf-8") as file:
            texts = file.read().splitlines()
        if not args.output:
            parser.error("--output is needed with --texts: the built-in asset belongs to the tabletop world")
    else:
        from octo_like.envs.language import all_instructions

        texts = all_instructions()
    model = train(texts, args.vocab_size)
    output = args.output or BUILTIN
    with open(output, "wb") as file:
        file.write(model)
    tokenizer = TextTokenizer(model, 64)
    lengths = tokenizer.encode(texts)["attention_mask"].sum(1)
    print(
        f"{output}: {tokenizer.vocab_size} pieces, {len(model)} bytes, {len(texts)} texts, "
        f"tokens per text mean {lengths.mean():.1f}, max {lengths.max()}"
    )


if __name__ == "__main__":
    sys.exit(main())
