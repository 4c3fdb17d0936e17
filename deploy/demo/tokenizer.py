"""The demo's tokenizer: 32 symbols, one token per character, saved in the Hugging Face format.

The tokenizer adds BOS itself, so `tokenizer(prompt).input_ids` is exactly what the demo models were trained on. EOS is
never added: the model generates it at the end of an answer.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deploy.demo.task import DIGITS, END_OF_PROMPT, END_OF_STEP, OPERATORS

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN)
# Letters that the task never uses. They fill the vocabulary up to 32 symbols, so that every id has a text.
SPARE_CHARACTERS = "abcdefghijklm"
SYMBOLS = (*SPECIAL_TOKENS, *DIGITS, *OPERATORS, END_OF_PROMPT, END_OF_STEP, *SPARE_CHARACTERS)
VOCABULARY = {symbol: token_id for token_id, symbol in enumerate(SYMBOLS)}

# A prompt with BOS and a right answer with EOS take 15 + 38 tokens. The models' context is this long.
MAX_LENGTH = 128

PAD_ID, BOS_ID, EOS_ID, UNKNOWN_ID = (VOCABULARY[token] for token in SPECIAL_TOKENS)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of both demo models. It pads on the left, as batched generation needs."""
    characters = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    characters.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
