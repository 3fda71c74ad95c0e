"""Arithmetic word problems of the sample set: one function a template, with worked steps."""

from collections.abc import Callable
from random import Random

# Question, worked steps (the last one still without its result) and the answer.
Problem = tuple[str, list[str], int]

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jack", "Zoé")
GOODS = ("pens", "books", "apples", "cakes", "tickets", "cups", "plants", "lamps")
SMALL_THINGS = ("marbles", "stamps", "shells", "cards", "coins", "sweets", "beads")


def shopping(rng: Random) -> Problem:
    name, goods = rng.choice(NAMES), rng.choice(GOODS)
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    cost = count * price
    note = rng.choice([note for note in (20, 50, 100) if note > cost])
    return (
        f"{name} buys {count} {goods} at £{price} each and pays with a £{note} note. "
        "How much change is there?",
        [f"The {goods} cost {count} * {price} = {cost}.", f"The change is {note} - {cost}"],
        note - cost,
    )


def sharing(rng: Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(SMALL_THINGS)
    friends, each = rng.randint(2, 9), rng.randint(2, 12)
    return (
        f"{name} shares {friends * each} {things} equally among {friends} friends. "
        f"How many {things} does each friend get?",
        [f"Each friend gets {friends * each} / {friends}"],
        each,
    )


def collecting(rng: Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(SMALL_THINGS)
    start, found, given = rng.randint(10, 60), rng.randint(5, 40), rng.randint(2, 14)
    more = start + found
    return (
        f"{name} has {start} {things}, finds {found} more and gives {given} to a friend. "
        f"How many {things} are left?",
        [f"With the new ones there are {start} + {found} = {more}.", f"Left are {more} - {given}"],
        more - given,
    )


def driving(rng: Random) -> Problem:
    vehicle = rng.choice(("car", "bus", "train", "lorry"))
    fast, slow = rng.choice((70, 80, 90, 100)), rng.choice((30, 40, 50, 60))
    hours, more_hours = rng.randint(2, 5), rng.randint(2, 4)
    first, second = fast * hours, slow * more_hours
    return (
        f"A {vehicle} goes {fast} km per hour for {hours} hours, then {slow} km per hour for "
        f"{more_hours} hours. How many km does it go in all?",
        [
            f"The first part is {fast} * {hours} = {first}.",
            f"The second part is {slow} * {more_hours} = {second}.",
            f"In all it goes {first} + {second}",
        ],
        first + second,
    )


def cycling(rng: Random) -> Problem:
    name, speed, hours = rng.choice(NAMES), rng.randint(8, 20), rng.randint(2, 6)
    return (
        f"{name} cycles {speed * hours} km at {speed} km per hour. How many hours does it take?",
        [f"The time is {speed * hours} / {speed}"],
        hours,
    )


def fencing(rng: Random) -> Problem:
    place = rng.choice(("garden", "field", "yard", "park"))
    width, length = rng.randint(3, 20), rng.randint(21, 40)
    half = width + length
    return (
        f"A {place} is {width} m wide and {length} m long. How many metres of fence go around it?",
        [f"Half of the way around is {width} + {length} = {half}.", f"The fence is 2 * {half}"],
        2 * half,
    )


def tiling(rng: Random) -> Problem:
    room = rng.choice(("kitchen", "hall", "bathroom", "shop"))
    width, length, price = rng.randint(2, 6), rng.randint(4, 9), rng.randint(5, 12)
    area = width * length
    return (
        f"A {room} is {width} m by {length} m. Tiles cost £{price} per square metre. "
        "How much do the tiles cost?",
        [f"The area is {width} * {length} = {area}.", f"The tiles cost {area} * {price}"],
        area * price,
    )


def discount(rng: Random) -> Problem:
    item = rng.choice(("coat", "bicycle", "chair", "phone", "table", "bag"))
    price, percent = 20 * rng.randint(2, 15), rng.choice((5, 10, 15, 20, 25, 30, 40))
    product = price * percent
    saved = product // 100
    return (
        f"A {item} costs £{price}. In the sale it is {percent} percent cheaper. "
        "What does it cost in the sale?",
        [
            f"{price} * {percent} = {product} and {product} / 100 = {saved}, so £{saved} is off.",
            f"The sale price is {price} - {saved}",
        ],
        price - saved,
    )


def ages(rng: Random) -> Problem:
    younger, older = rng.sample(NAMES, 2)
    age, gap = rng.randint(4, 30), rng.randint(2, 12)
    other = age + gap
    return (
        f"{younger} is {age} years old. {older} is {gap} years older. How old are they together?",
        [f"{older} is {age} + {gap} = {other} years old.", f"Together they are {age} + {other}"],
        age + other,
    )


def selling(rng: Random) -> Problem:
    goods, boxes, size = rng.choice(GOODS), rng.randint(3, 12), rng.randint(4, 12)
    stock = boxes * size
    sold = rng.randint(2, stock - 1)
    return (
        f"A shop has {boxes} boxes of {size} {goods} and sells {sold} {goods}. "
        f"How many {goods} are left?",
        [f"The shop has {boxes} * {size} = {stock} {goods}.", f"Left are {stock} - {sold}"],
        stock - sold,
    )


def wages(rng: Random) -> Problem:
    name, hours = rng.choice(NAMES), rng.randint(3, 8)
    pay, days = rng.randint(9, 20), rng.randint(2, 6)
    day = hours * pay
    return (
        f"{name} works {hours} hours a day for £{pay} per hour. "
        f"How much does {name} earn in {days} days?",
        [f"One day earns {hours} * {pay} = {day}.", f"{days} days earn {day} * {days}"],
        day * days,
    )


def colours(rng: Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(SMALL_THINGS)
    word, parts = rng.choice((("half", 2), ("a third", 3), ("a quarter", 4), ("a fifth", 5)))
    red = rng.randint(3, 20)
    return (
        f"{name} has {red * parts} {things}. If {word} of them are red, how many are not red?",
        [f"Red are {red * parts} / {parts} = {red}.", f"Not red are {red * parts} - {red}"],
        red * parts - red,
    )


def average(rng: Random) -> Problem:
    name, mean = rng.choice(NAMES), rng.randint(8, 30)
    low, high = mean - rng.randint(1, 7), mean + rng.randint(1, 5)
    last = 3 * mean - low - high
    two = low + high
    return (
        f"{name} scores {low}, {high} and {last} points in three games. What is the average?",
        [
            f"The sum is {low} + {high} = {two} and {two} + {last} = {two + last}.",
            f"The average is {two + last} / 3",
        ],
        mean,
    )


def saving(rng: Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(("guitar", "tent", "camera", "skateboard"))
    weekly, weeks, start = rng.randint(4, 15), rng.randint(3, 12), rng.randint(5, 40)
    missing = weekly * weeks
    return (
        f"{name} has £{start} and saves £{weekly} a week for a {item} that costs "
        f"£{start + missing}. How many weeks does it take?",
        [
            f"Missing are {start + missing} - {start} = {missing}.",
            f"The number of weeks is {missing} / {weekly}",
        ],
        weeks,
    )


def reading(rng: Random) -> Problem:
    name, pages, days = rng.choice(NAMES), rng.randint(10, 40), rng.randint(3, 9)
    rest = rng.randint(20, 120)
    read = pages * days
    return (
        f"A book has {read + rest} pages. {name} reads {pages} pages a day for {days} days. "
        "How many pages are left?",
        [f"{name} reads {pages} * {days} = {read} pages.", f"Left are {read + rest} - {read}"],
        rest,
    )


def recipe(rng: Random) -> Problem:
    food = rng.choice(("rice", "flour", "pasta", "sugar"))
    few, many, grams = rng.randint(2, 4), rng.randint(5, 12), 10 * rng.randint(2, 15)
    return (
        f"A recipe for {few} people needs {few * grams} g of {food}. "
        f"How many grams do {many} people need?",
        [
            f"One person needs {few * grams} / {few} = {grams}.",
            f"{many} people need {grams} * {many}",
        ],
        grams * many,
    )


def packing(rng: Random) -> Problem:
    goods, size = rng.choice(("eggs", "jars", "bottles", "balls")), rng.randint(4, 12)
    boxes, rest = rng.randint(3, 12), rng.randint(1, size - 1)
    packed = size * boxes
    return (
        f"{packed + rest} {goods} are packed into {boxes} full boxes of {size}. "
        f"How many {goods} are left over?",
        [
            f"The boxes hold {boxes} * {size} = {packed}.",
            f"Left over are {packed + rest} - {packed}",
        ],
        rest,
    )


def legs(rng: Random) -> Problem:
    small, large = rng.choice(("hens", "ducks", "geese")), rng.choice(("cows", "goats", "sheep"))
    few, many = rng.randint(2, 15), rng.randint(2, 15)
    two, four = few * 2, many * 4
    return (
        f"A farm has {few} {small} and {many} {large}. How many legs do they have in all?",
        [
            f"The {small} have {few} * 2 = {two} legs.",
            f"The {large} have {many} * 4 = {four} legs.",
            f"In all they have {two} + {four}",
        ],
        two + four,
    )


TEMPLATES: tuple[Callable[[Random], Problem], ...] = (
    shopping,
    sharing,
    collecting,
    driving,
    cycling,
    fencing,
    tiling,
    discount,
    ages,
    selling,
    wages,
    colours,
    average,
    saving,
    reading,
    recipe,
    packing,
    legs,
)


def maths_pairs(rng: Random, per_template: int) -> list[tuple[str, str]]:
    """Distinct word problems, `per_template` of each template.

    Returns:
      (question, answer) pairs; each line of an answer is a step with its equation, and the last
      line is ``The answer is N.``
    """
    pairs: dict[str, str] = {}
    while len(pairs) < per_template * len(TEMPLATES):
        template = TEMPLATES[len(pairs) % len(TEMPLATES)]
        question, steps, answer = template(rng)
        pairs[question] = "\n".join(steps) + f" = {answer}.\nThe answer is {answer}."
    return list(pairs.items())
