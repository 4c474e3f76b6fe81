"""Writes the items of prefopt's own tasks: `python -m prefopt.evaluation.capability_tasks.generate`.

Arithmetic and reasoning are drawn from templates with a seed, so that answers are right by
construction and no item comes from a published test set; format and writing prompts are written here.
The files are committed, and a test makes them again and compares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from prefopt.data.records import write_bytes

FOLDER = Path(__file__).parent
SEED = 20_251_126

Row = dict[str, Any]
Kinds = Sequence[tuple[str, int, Callable[[Random], Row]]]
"""A kind's name, how many items it has, and what draws one."""


def main() -> None:
    """Write every item file into this folder."""
    for name, rows in all_items().items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_bytes(FOLDER / f"{name}.jsonl", lines.encode())


def all_items() -> dict[str, list[Row]]:
    """The items of each task, by the name of its file."""
    return {
        "arithmetic": arithmetic_items(),
        "reasoning": reasoning_items(),
        "format": format_items(),
        "writing": writing_items(),
    }


def _drawn(kinds: Kinds, rng: Random) -> list[Row]:
    """Rows of every kind with different questions, mixed so that the first n are a fair sample."""
    rows: list[Row] = []
    taken: set[str] = set()
    for kind, n, draw in kinds:
        for _ in range(n):
            row = draw(rng)
            while (asked := row["question"] + row.get("stem", "")) in taken:
                row = draw(rng)
            taken.add(asked)
            rows.append({"kind": kind, **row})
    rng.shuffle(rows)
    return rows


# Arithmetic: from what the smallest models can do to what takes a large one.


def _sum(low: int, high: int) -> Callable[[Random], Row]:
    def draw(rng: Random) -> Row:
        a, b = rng.randint(low, high), rng.randint(low, high)
        return {"question": f"{a} + {b}", "answer": str(a + b)}

    return draw


def _difference(low: int, high: int) -> Callable[[Random], Row]:
    def draw(rng: Random) -> Row:
        a, b = sorted((rng.randint(low, high), rng.randint(low, high)), reverse=True)
        return {"question": f"{a} - {b}", "answer": str(a - b)}

    return draw


def _product(low: int, high: int) -> Callable[[Random], Row]:
    def draw(rng: Random) -> Row:
        a, b = rng.randint(low, high), rng.randint(low, high)
        return {"question": f"{a} * {b}", "answer": str(a * b)}

    return draw


def _two_steps(rng: Random) -> Row:
    a, b, c = rng.randint(2, 20), rng.randint(2, 20), rng.randint(2, 9)
    return {"question": f"({a} + {b}) * {c}", "answer": str((a + b) * c)}


ARITHMETIC: Kinds = (
    ("sum of one digit", 14, _sum(2, 9)),
    ("sum of tens", 16, _sum(10, 49)),
    ("sum of two digits", 16, _sum(11, 99)),
    ("sum of three digits", 8, _sum(100, 999)),
    ("difference of one digit", 12, _difference(2, 19)),
    ("difference of two digits", 12, _difference(20, 99)),
    ("product of one digit", 14, _product(2, 9)),
    ("product of two digits", 4, _product(11, 39)),
    ("two steps", 4, _two_steps),
)


def arithmetic_items() -> list[Row]:
    """100 calculations."""
    return _drawn(ARITHMETIC, Random(SEED))


# Reasoning and knowledge: the answer is begun ("stem"), and the most likely of several ends counts.
# Begun answers are what the smallest models can finish; without, they choose hardly above chance.

NAMES = (
    "Anna",
    "Ben",
    "Carl",
    "Dana",
    "Emma",
    "Fred",
    "Jack",
    "Kate",
    "Lucy",
    "Mark",
    "Paul",
    "Tom",
)
ORDERS = (
    ("taller than", "tallest", "shortest"),
    ("older than", "oldest", "youngest"),
    ("faster than", "fastest", "slowest"),
    ("richer than", "richest", "poorest"),
)
THINGS = ("apples", "books", "coins", "cups", "eggs", "pens", "stones", "toys")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
KINDS = {
    "fruit": ("apple", "banana", "cherry", "peach", "lemon", "plum"),
    "animal": ("horse", "rabbit", "tiger", "monkey", "sheep", "goat"),
    "tool": ("hammer", "saw", "drill", "wrench", "shovel", "screwdriver"),
    "vehicle": ("car", "truck", "bicycle", "bus", "train", "van"),
    "instrument": ("piano", "violin", "guitar", "drum", "flute", "trumpet"),
    "tree": ("pine", "birch", "maple", "willow", "spruce", "beech"),
}
CAPITALS = (
    ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"),
    ("Egypt", "Cairo"), ("Greece", "Athens"), ("Germany", "Berlin"), ("Russia", "Moscow"),
    ("Austria", "Vienna"), ("Portugal", "Lisbon"), ("Cuba", "Havana"), ("Norway", "Oslo"),
    ("Canada", "Ottawa"), ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Poland", "Warsaw"),
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("old", "young"), ("happy", "sad"),
    ("light", "dark"), ("up", "down"), ("full", "empty"), ("rich", "poor"), ("early", "late"),
    ("hard", "soft"), ("open", "closed"), ("wet", "dry"), ("loud", "quiet"), ("strong", "weak"),
    ("near", "far"),
)  # fmt: skip
# What follows from the first part; the second ending is as well formed and does not follow.
CONSEQUENCES = (
    ("The glass fell on the stone floor, so", "it broke", "it sang"),
    ("It was raining hard, so she took", "an umbrella", "a ladder"),
    ("He was very hungry, so he", "ate a sandwich", "painted a fence"),
    ("The room was dark, so she", "turned on the lamp", "closed the window"),
    ("The soup was too hot, so he", "waited a while", "added a chair"),
    ("The baby was tired, so it", "fell asleep", "drove away"),
    ("The battery was empty, so the phone", "turned off", "grew taller"),
    ("The ice was left in the sun, so it", "melted", "froze"),
    ("She studied for weeks, so she", "passed the exam", "missed the exam"),
    ("The road was icy, so the car", "slid", "flew"),
    ("The plant got no water for a month, so it", "died", "bloomed"),
    ("He lost his key, so he could not", "open the door", "hear the bird"),
    ("The shop was closed, so they", "went home", "bought bread there"),
    ("The dog heard a noise, so it", "barked", "read a book"),
    ("The bag was too heavy, so she", "asked for help", "put more in it"),
    ("The bus was late, so he", "missed the meeting", "arrived too early"),
)


def _order(rng: Random) -> Row:
    a, b, c = people = rng.sample(NAMES, 3)
    relation, most, least = rng.choice(ORDERS)
    facts = [f"{a} is {relation} {b}.", f"{b} is {relation} {c}."]
    rng.shuffle(facts)
    end, answer = rng.choice([(most, a), (least, c)])
    question = f"{' '.join(facts)} Who is the {end}?"
    return _choice(rng, question, f"The {end} is", people, answer)


def _counting(rng: Random) -> Row:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    a, b = rng.randint(2, 5), rng.randint(2, 4)
    if rng.random() < 0.5:
        story, total = f"{name} has {a} {thing} and gets {b} more.", a + b
    else:
        story, total = f"{name} has {a + b} {thing} and gives away {b}.", a
    wrong = rng.sample([n for n in range(2, 10) if n != total], 3)
    question = f"{story} How many {thing} does {name} have now?"
    return _numbers(rng, question, f"{name} now has", total, wrong)


def _member(rng: Random) -> Row:
    kind, *others = rng.sample(sorted(KINDS), 4)
    word = rng.choice(KINDS[kind])
    question = f'What kind of thing is meant by the word "{word}"?'
    return _choice(rng, question, f'The word "{word}" means a kind of', [kind, *others], kind)


def _capital(rng: Random) -> Row:
    (country, answer), *others = rng.sample(CAPITALS, 4)
    question = f"What is the capital of {country}?"
    choices = [answer, *(city for _, city in others)]
    return _choice(rng, question, f"The capital of {country} is", choices, answer)


def _calendar(rng: Random) -> Row:
    ring, what = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    i, (step, side) = rng.randrange(len(ring)), rng.choice(((1, "after"), (-1, "before")))
    answer = ring[(i + step) % len(ring)]
    wrong = rng.sample([x for x in ring if x not in (answer, ring[i])], 3)
    question = f"Which {what} comes right {side} {ring[i]}?"
    return _choice(rng, question, f"The {what} {side} {ring[i]} is", [answer, *wrong], answer)


def _sequence(rng: Random) -> Row:
    start, step = rng.randint(1, 12), rng.choice((1, 2, 3, 5, 10))
    shown = ", ".join(str(start + i * step) for i in range(4))
    answer = start + 4 * step
    wrong = rng.sample(sorted({answer + d for d in (-2, -1, 1, 2, 3, step + 1)}), 3)
    return _numbers(rng, f"What number comes next: {shown}?", f"{shown},", answer, wrong)


def _opposite(rng: Random) -> Row:
    word, answer = pair = rng.choice(OPPOSITES)
    wrong = [rng.choice(p) for p in rng.sample([p for p in OPPOSITES if p != pair], 3)]
    question = f'What is the opposite of "{word}"?'
    return _choice(rng, question, f'The opposite of "{word}" is', [answer, *wrong], answer)


def _consequence(rng: Random) -> Row:
    start, right, wrong = rng.choice(CONSEQUENCES)
    return _choice(
        rng, "Finish a sentence in a way that makes sense.", start, [right, wrong], right
    )


def _numbers(rng: Random, question: str, stem: str, answer: int, wrong: Sequence[int]) -> Row:
    return _choice(rng, question, stem, [str(n) for n in (answer, *wrong)], str(answer))


def _choice(rng: Random, question: str, stem: str, options: Sequence[str], answer: str) -> Row:
    mixed = rng.sample(list(options), len(options))
    return {"question": question, "stem": stem, "choices": mixed, "answer": mixed.index(answer)}


REASONING: Kinds = (
    ("order", 12, _order),
    ("counting", 14, _counting),
    ("member", 14, _member),
    ("capital", 12, _capital),
    ("calendar", 14, _calendar),
    ("sequence", 14, _sequence),
    ("opposite", 10, _opposite),
    ("consequence", 10, _consequence),
)


def reasoning_items() -> list[Row]:
    """100 questions with two to four choices each."""
    return _drawn(REASONING, Random(SEED + 1))


# Format: an instruction and the check that decides it; see checks.py.

FORMATS: tuple[tuple[str, str, str], ...] = (
    ("upper_case", "", "What is the capital of Italy? Write your answer in capital letters only."),
    ("upper_case", "", "Greet a new neighbor in one short sentence. USE CAPITAL LETTERS ONLY."),
    ("upper_case", "", "Write the word 'welcome' in all capital letters."),
    ("upper_case", "", "Name a fruit. Answer in ALL CAPS."),
    ("lower_case", "", "Describe the sea in one short sentence. Use lower case letters only."),
    ("lower_case", "", "Name three colors, all in lower case, without any capital letter."),
    ("lower_case", "", "Write one short sentence about cats without using capital letters."),
    ("lower_case", "", "Write HELLO FRIEND in lower case."),
    ("starts_with", "Once", "Write one sentence of a fairy tale. Start with the word 'Once'."),
    ("starts_with", "Dear", "Write the first sentence of a letter. Begin with the word 'Dear'."),
    ("starts_with", "Yes", "Is water wet? Start your answer with the word 'Yes'."),
    ("starts_with", "However", "Write one sentence about winter that begins with 'However'."),
    ("starts_with", "Today", "Write one sentence about school. Your first word must be 'Today'."),
    ("ends_with", "the end", "Tell a story in two sentences. Finish with the words 'The end.'"),
    ("ends_with", "thank you", "Ask for a glass of water politely. End with 'Thank you.'"),
    ("ends_with", "amen", "Write a one-sentence wish. The last word must be 'amen'."),
    ("ends_with", "good night", "Say goodbye in one sentence that ends with 'good night'."),
    ("contains", '["river"]', "Write one sentence about a trip. Use the word 'river'."),
    ("contains", '["bread", "milk"]', "Write a sentence with the words 'bread' and 'milk'."),
    ("contains", '["because"]', "Why do people sleep? Answer in a sentence with 'because'."),
    ("contains", '["moon", "dog"]', "Write one sentence that has both 'moon' and 'dog' in it."),
    ("contains", '["purple"]', "Describe a hat in one sentence. Use the word 'purple'."),
    ("avoids", ",", "Name an animal and say what it eats. Do not use any commas."),
    ("avoids", ",", "Describe a forest in two sentences without using a comma."),
    ("avoids", "the", "Write a short sentence about birds without the word 'the'."),
    ("avoids", "!", "Congratulate a friend. Do not use an exclamation mark."),
    ("bullets", "3", "List three kinds of fruit as bullet points. Write only the three bullets."),
    ("bullets", "2", "Give two tips for better sleep as bullet points starting with '-'."),
    ("bullets", "4", "List four animals as bullet points, each line starting with '* '."),
    ("bullets", "3", "Name three drinks. Use exactly 3 bullet points that start with '- '."),
    ("numbered", "3", "List three cities as a numbered list from 1 to 3."),
    ("numbered", "2", "Give two steps for making tea as a numbered list with 1. and 2."),
    ("numbered", "4", "Write a numbered list of four vegetables."),
    ("numbered", "3", "Name three sports in a numbered list."),
    ("comma_list", "3", "Name three colors in one line, separated by commas. Write nothing else."),
    ("comma_list", "4", "Name four animals, separated by commas. Write only the list."),
    ("comma_list", "5", "Write the numbers from 1 to 5 in one line, separated by commas."),
    ("comma_list", "3", "Name three European countries in one line, separated by commas."),
    ("json_object", '["name"]', 'Write a JSON object with the key "name" for Bob. Only JSON.'),
    ("json_object", '["name", "age"]', 'Answer only with JSON like {"name": ..., "age": ...}.'
     " Anna is 30 years old."),
    ("json_object", '["city"]', 'Give the capital of Spain as {"city": "..."}. Only the JSON.'),
    ("json_object", '["color"]', 'Answer in JSON with the key "color": what color is grass?'),
    ("one_word", "", "What color is the sky on a clear day? Answer with one word."),
    ("one_word", "", "What is the opposite of 'hot'? Answer with one word only."),
    ("one_word", "", "Which animal says 'meow'? Reply with a single word."),
    ("one_word", "", "What do bees make? One word."),
    ("at_most_words", "5", "What is rain? Answer in at most five words."),
    ("at_most_words", "10", "What does a doctor do? Use at most 10 words."),
    ("at_most_words", "8", "What is a bridge for? Answer in no more than 8 words."),
    ("at_most_words", "12", "Why do we brush our teeth? Use no more than 12 words."),
    ("one_sentence", "", "Explain what a library is in exactly one sentence."),
    ("one_sentence", "", "What is photosynthesis? Answer in one sentence."),
    ("one_sentence", "", "Describe your favorite season in a single sentence."),
    ("one_sentence", "", "Why is the sky blue? Give one sentence."),
    ("quoted", "", "Write a short proverb inside double quotation marks and nothing else."),
    ("quoted", "", 'Translate "gracias" to English. Put the answer in double quotes.'),
    ("quoted", "", "Repeat this with double quotes around it: Good morning"),
    ("yes_or_no", "", "Is the sun a star? Answer only yes or no."),
    ("yes_or_no", "", "Can fish breathe under water? Answer with yes or no only."),
    ("yes_or_no", "", "Is ice hotter than fire? Reply with just 'yes' or 'no'."),
    ("question", "", "Ask me something about my weekend. Write only one question."),
    ("question", "", "Write one question that a teacher may ask about history."),
    ("number_only", "", "How many legs does a spider have? Answer with a number only."),
    ("number_only", "", "How many days are in a week? Write only the number."),
)  # fmt: skip


def format_items() -> list[Row]:
    """64 instructions whose fulfilment code can decide."""
    rows = [
        {"kind": check, "question": prompt, "argument": argument}
        for check, argument, prompt in FORMATS
    ]
    Random(SEED + 2).shuffle(rows)
    return rows


# Writing: open prompts for a judge.

WRITING: tuple[str, ...] = (
    "Write a short thank-you note to a teacher.",
    "Describe a quiet morning in a small town.",
    "Explain to a child why leaves change color in autumn.",
    "Write an invitation to a garden party.",
    "Give advice to somebody who starts a new job tomorrow.",
    "Describe the taste of fresh bread to someone who has never eaten any.",
    "Write a product description for a wooden chair.",
    "Explain how to plant a tree.",
    "Write the opening of a story about a lost key.",
    "Summarize why sleep is important in a few sentences.",
    "Write a polite complaint about a late delivery.",
    "Describe a storm at sea.",
    "Explain what a budget is to a teenager.",
    "Write a short speech for a friend's birthday.",
    "Compare living in a city with living in the country.",
    "Write a message that reminds a colleague of a meeting.",
    "Describe an old bicycle so that one can picture it.",
    "Explain how to calm down before an exam.",
    "Write a short review of an imaginary restaurant.",
    "Tell a very short story about two rivers.",
    "Explain why it is useful to learn a second language.",
    "Write a weather report for a sunny spring day.",
    "Describe how to make a simple soup.",
    "Write a short apology to a neighbor for loud music.",
)


def writing_items() -> list[Row]:
    """24 open prompts."""
    return [{"kind": "writing", "question": prompt} for prompt in WRITING]


if __name__ == "__main__":
    main()
