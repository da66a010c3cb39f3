"""Numbers are the same however they are written, and others where a separator means something else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from middo_jax.refinement.acceptance.context import changed_numbers, numbers


@pytest.mark.parametrize(
    ("original", "rewrite"),
    [
        ("Pay 12,500.75 dollars.", "Pay 12500.75 dollars."),
        ("Take 0.25 of 8.", "Take .25 of 8."),
        ("It was -.5 of 3.", "It was -0.5 of 3."),
        ("Zahle 1.250,50 Euro für die Reise.", "Zahle 1250,5 Euro für die Reise."),
        ("Das kostet 1.250 Euro und mehr.", "Das kostet 1250 Euro und mehr."),
        ("It costs 2,000,000 dollars.", "It costs 2000000 dollars."),
        ("It costs 10 000 dollars.", "It costs 10,000 dollars."),
        ("It costs 10\u202f000 dollars.", "It costs 10000 dollars."),
        ("Es kostet 1'000 Franken.", "Es kostet 1000 Franken."),
        ("Count 1,00,000 rupees.", "Count 100000 rupees."),
        ("Set n to 1_000_000.", "Set n to 1000000."),
        ("Add [1,2,3].", "Add [1, 2, 3]."),
        ("Nimm 0,5 Liter.", "Nimm 0.5 Liter."),
        ("It is 0,125.", "It is 0.125."),
        ("Pour 3.000 of the litres.", "Pour 3 of the litres."),
        ("١٢٫٥ زائد ٣", "12.5 + 3"),
        ("Run v3.11.2 of it.", "Use v3.11.2 of it."),
        ("Add 5 100 and stop.", "Add 5 and 100 and stop."),
        ("It is -5 degrees.", "It is minus 5 degrees."),
        ("It is -5 degrees.", "It is 5 degrees below zero."),
        ("The balance is -$5.", "The balance is −5 dollars."),
        ("From -5 y -3.", "From -3 y -5."),
        ("Solve 7 - 5 = x.", "Solve 7 -5 = x."),
        ("Solve x -5 = 2.", "Solve x - 5 = 2."),
        ("It takes 3-5 days.", "It takes 3 to 5 days."),
        ("Compute f(-3).", "Compute f( −3 )."),
        ("Take 1/2 cup.", "Take 0.5 cups."),
        ("Take 1½ cups.", "Take 1 1/2 cups."),
        ("Take 1 1/2 cups.", "Take 1.5 cups."),
        ("Compute 3/4.", r"Compute $\frac{3}{4}$."),
        ("Take 2/3 of them.", "Take 2 out of 3 of them."),
        ("Open 24/7.", "Open 24 hours, 7 days."),
        ("On 3/4/2021.", "On 3/4/2021, please."),
        ("Take 50% of it.", "Take 50 per cent of it."),
        ("Nimm 50 % davon.", "Nimm 50 Prozent davon."),
        ("A percentage of 50.", "It is 50%."),
        ("Take 5-10% of it.", "Take 5% to 10% of it."),
        ("%50 indirim", "yüzde 50 indirim"),
    ],
)
def test_another_spelling_keeps_a_number(original: str, rewrite: str) -> None:
    assert changed_numbers(original, rewrite) is None
    assert changed_numbers(rewrite, original) is None


@pytest.mark.parametrize(
    ("original", "rewrite"),
    [
        ("Take 1/2 cup.", "Take half a cup."),
        ("Take 2/3 of them.", "Take two-thirds of them."),
        ("Take 0.75 of it.", "Take three quarters of it."),
        ("Take 50% of it.", "Take half of it."),
        ("A change of -50%.", "A fall of 50%."),
        ("It is -1/2.", "It is minus one half."),
    ],
)
def test_words_keep_a_fraction(original: str, rewrite: str) -> None:
    assert changed_numbers(original, rewrite) is None


@pytest.mark.parametrize(
    ("original", "rewrite", "fault"),
    [
        ("Take 0.375 kg of rice.", "Take 375 kg of rice.", "0.375 not kept"),
        ("Take 2.125 kg of rice.", "Take 2125 kg of rice.", "2.125 not kept"),
        ("Take 3.000 of the litres.", "Take 3000 of the litres.", "3 not kept"),
        ("Nimm 2,125 kg von der Butter.", "Nimm 2125 kg von der Butter.", "2.125 not kept"),
        ("It is 1.5 of it.", "It is 15 of it.", "1.5 not kept"),
        ("It is 0.001 of it.", "It is 1 of it.", "0.001 not kept"),
        ("Add 12,345.678 to it.", "Add 12345678 to it.", "12345.678 not kept"),
        ("Add [1,2,3].", "Add [1, 2, 4].", "3 not kept"),
        ("Run v3.11.2 of it.", "Run v3.11.3 of it.", "3.11.2 not kept"),
        ("It is -5 degrees.", "It is 5 degrees.", "-5 not kept"),
        ("It is 5 degrees.", "It is -5 degrees.", "5 not kept"),
        ("Add −5 and 3.", "Add 5 and −3.", "-5, 3 not kept"),
        ("Compute f(-3).", "Compute f(3).", "-3 not kept"),
        ("Take 1/2 of 3.", "Take 2/1 of 3.", "1/2 not kept"),
        ("Take 1/2 and 3.", "Take 1/3 and 2.", "1/2 not kept"),
        ("Take ½ cup.", "Take ⅓ cup.", "1/2 not kept"),
        (r"Compute $\frac{3}{4}$.", r"Compute $\frac{4}{3}$.", "3/4 not kept"),
        ("Take 1 1/2 cups.", "Take 1 1/3 cups.", "1 1/2 not kept"),
        ("Take 50% of it.", "Take 50 of it.", "50% not kept"),
        ("Add 50 to it.", "Add 50% to it.", "50 not kept"),
        ("A change of -50%.", "A change of 50%.", "-50% not kept"),
    ],
)
def test_another_number_is_not_the_same(original: str, rewrite: str, fault: str) -> None:
    assert changed_numbers(original, rewrite) == fault


def test_the_numbers_of_a_text_in_one_form() -> None:
    assert numbers("10,000.50, .5, 0,5 and 1 000") == ["10000.5", "0.5", "1000"]
    assert numbers("-5, 20 %, ½ and 7 - 5") == ["-5", "20%", "1/2", "7", "5"]


@given(st.text(alphabet="0123456789.,/-−%½$ x()\n"))
def test_a_text_keeps_its_own_numbers(text: str) -> None:
    assert changed_numbers(text, text) is None
