"""Trains a small sentencepiece model: one of those of the built-in world, or one for your own texts.

    python scripts/train_tokenizer.py                    # rewrites octo_like/common/assets/tabletop.model
    python scripts/train_tokenizer.py --builtin words    # and assets/words.model: all that is said in the tabletop
    python scripts/train_tokenizer.py --texts my_instructions.txt --output my.model --vocab_size 512
    python scripts/train_tokenizer.py --texts my_answers.txt --output my.model --vocab_size 1024 --symbols locations

Training is deterministic: one thread, sorted unique texts. Symbols are pieces of their own, never split nor merged;
`locations` stands for the 64 location tokens <loc00> to <loc63>.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import io
import sys
from collections.abc import Sequence

# Every printable letter a user may type is a piece of its own, so unseen words are spelled instead of lost.
REQUIRED_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-_/()+&%"


VOCABULARIES = {"tabletop": 192, "words": 512}  # sizes of the built-in ones


def train(texts: list[str], vocab_size: int, symbols: Sequence[str] = ()) -> bytes:
    """Serialised sentencepiece model (pad 0, </s> 1, <unk> 2; lower-casing) of at most `vocab_size` pieces.

    Args:
      symbols: texts that are one piece each, wherever they occur; lower case.
    """
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
        **({"user_defined_symbols": list(symbols)} if symbols else {}),
        bos_id=-1,
        num_threads=1,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    return buffer.getvalue()


def builtin_texts(name: str) -> list[str]:
    """What the built-in vocabulary `name` is trained on."""
    from octo_like.envs.language import all_instructions

    if name == "tabletop":
        return all_instructions()
    from octo_like.envs.long_language import all_long_instructions, all_subtasks
    from octo_like.envs.picture_words import all_texts

    return [*all_instructions(every=True), *all_long_instructions(), *all_subtasks(), *all_texts()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--builtin", choices=VOCABULARIES, help="which built-in vocabulary to write (default: tabletop)"
    )
    parser.add_argument("--texts", help="text file with one text a line, instead of those of the built-in world")
    parser.add_argument("--output", help="where to write the model (default: the built-in asset)")
    parser.add_argument("--vocab_size", type=int, help="pieces (default: 192; 512 with --builtin words)")
    parser.add_argument(
        "--symbols", nargs="+", default=[], metavar="TEXT", help="pieces of their own; 'locations': <loc00> to <loc63>"
    )
    args = parser.parse_args()

    from octo_like.common.location_tokens import TOKENS
    from octo_like.common.text import ASSETS, TextTokenizer

    builtin = args.builtin or "tabletop"
    symbols = [token for text in args.symbols for token in (TOKENS if text == "locations" else [text])]
    if builtin == "words":
        symbols = list(dict.fromkeys([*TOKENS, *symbols]))
    if any(symbol != symbol.lower() or not symbol.strip() for symbol in symbols):
        parser.error("--symbols: texts are put into lower case before they are cut into pieces; give lower case")
    if args.texts:
        if args.builtin:
            parser.error("--texts and --builtin contradict one another")
        with open(args.texts, encoding="utf-8") as file:
            texts = file.read().splitlines()
        if not args.output:
            parser.error("--output is needed with --texts: the built-in asset belongs to the tabletop world")
    else:
        texts = builtin_texts(builtin)
    model = train(texts, args.vocab_size or VOCABULARIES[builtin], symbols)
    output = args.output or ASSETS[builtin]
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
