"""Porter's stemmer, the stem stage of METEOR: "opacities" -> "opac", "calcified" -> "calcifi".

Source: Porter 1980 ("An algorithm for suffix stripping"), with his own later changes and those of NLTK 3's
default mode (NLTK_EXTENSIONS), which the published scores use.
"""

import re
from functools import lru_cache

# Words that the rules would bring together wrongly, or keep apart.
IRREGULAR = {
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "innings": "inning",
    "outings": "outing",
    "cannings": "canning",
}
IRREGULAR |= {
    word: word
    for word in ("sky", "news", "inning", "outing", "canning", "howe", "proceed", "exceed", "succeed")
}

# Suffix -> replacement; of the suffixes that a word ends with, the first in the list is the one.
STEP2 = {
    "ational": "ate",
    "tional": "tion",
    "enci": "ence",
    "anci": "ance",
    "izer": "ize",
    "bli": "ble",
    "entli": "ent",
    "eli": "e",
    "ousli": "ous",
    "ization": "ize",
    "ation": "ate",
    "ator": "ate",
    "alism": "al",
    "iveness": "ive",
    "fulness": "ful",
    "ousness": "ous",
    "aliti": "al",
    "iviti": "ive",
    "biliti": "ble",
    "fulli": "ful",
    "logi": "log",
}
STEP3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
STEP4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split()


@lru_cache(maxsize=2**16)
def porter_stem(word: str) -> str:
    """Return the stem of one word, lower-cased. Words of one or two letters stay as they are."""
    word = word.lower()
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    return _step5(_step4(_step3(_step2(_step1(word)))))


def _letters(word: str) -> str:
    """c and v for consonants and vowels; y is a vowel after a consonant."""
    kinds = ""
    for letter in word:
        vowel = letter in "aeiou" or letter == "y" and kinds[-1:] == "c"
        kinds += "v" if vowel else "c"
    return kinds


def _measure(stem: str) -> int:
    """Count how many times vowels are followed by consonants."""
    return _letters(stem).count("vc")


def _ends_cvc(word: str) -> bool:
    """consonant, vowel, consonant other than w, x, y at the end; or a word of a vowel and a consonant."""
    kinds = _letters(word)
    return kinds == "vc" or kinds[-3:] == "cvc" and word[-1] not in "wxy"


def _step1(word: str) -> str:
    """Remove plurals, -ed and -ing; y after a consonant becomes i."""
    if word.endswith("ies") and len(word) == 4:
        word = word[:-1]  # ties -> tie
    elif word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    if word.endswith("ied"):
        word = word[: -1 if len(word) == 4 else -2]
    elif word.endswith("eed"):
        word = word[:-1] if _measure(word[:-3]) else word
    else:
        stem = re.sub("(ed|ing)$", "", word)
        if stem != word and "v" in _letters(stem):
            word = _restored(stem)
    if word.endswith("y") and _letters(word[:-1])[1:].endswith("c"):
        word = word[:-1] + "i"
    return word


def _restored(stem: str) -> str:
    """Restore the end of a word without its -ed or -ing: conflat -> conflate, hopp -> hop, fil -> file."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1:] == stem[-2:-1] and _letters(stem).endswith("c"):
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _ends_cvc(stem) else stem


def _step2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]):
        word = word[:-2]  # -ally: the rest is again a word of this step
    suffix = next((s for s in STEP2 if word.endswith(s)), None)
    if suffix is None:
        return word
    stem = word.removesuffix(suffix)
    # The l of -logi counts to the stem, so that geologi is shortened like archaeologi.
    return stem + STEP2[suffix] if _measure(stem + "l" * (suffix == "logi")) else word


def _step3(word: str) -> str:
    suffix = next((s for s in STEP3 if word.endswith(s)), None)
    stem = word.removesuffix(suffix or "")
    return stem + STEP3[suffix] if suffix and _measure(stem) else word


def _step4(word: str) -> str:
    suffix = next((s for s in STEP4 if word.endswith(s)), None)
    stem = word.removesuffix(suffix or "")
    if suffix is None or _measure(stem) < 2 or suffix == "ion" and not stem.endswith(("s", "t")):
        return word
    return stem


def _step5(word: str) -> str:
    """Remove a last e, and one of two l."""
    if word.endswith("e"):
        measure = _measure(word[:-1])
        if measure > 1 or measure == 1 and not _ends_cvc(word[:-1]):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
