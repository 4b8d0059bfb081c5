"""Lists of words: their published sizes, and files of one's own."""

import pytest

from moresjax.core.errors import UserError
from moresjax.data.word_lists import NAMES, word_list


def test_lists_have_the_published_numbers_of_words():
    assert [len(word_list(name)) for name in NAMES] == [30, 48, 145, 53, 52]
    assert "bus stop" in word_list("places")  # words may have blanks


def test_files_of_words(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Tiger, lion\nzebra\n\nlion\n")
    assert word_list(file) == ("tiger", "lion", "zebra")
    file.write_text(" \n,")
    with pytest.raises(UserError, match=r"mine.txt holds no words"):
        word_list(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"mine.txt is no text"):
        word_list(file)
    with pytest.raises(UserError, match="unknown list of words 'colours'; choose from: colors"):
        word_list("colours")
