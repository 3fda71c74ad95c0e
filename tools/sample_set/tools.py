"""Tool-use trajectories of the sample set in Qwen v1's ReAct form, with tools that really run."""

import json
from collections.abc import Callable
from datetime import date, timedelta
from random import Random
from typing import NamedTuple

SKY = {"Paris": "sunny", "London": "rain", "Oslo": "snow", "Rome": "sunny", "Berlin": "cloudy"}
DEGREES = {"Paris": 21, "London": 14, "Oslo": -3, "Rome": 27, "Berlin": 17}
PRICES = {"lamp": 24, "chair": 45, "desk": 120, "mug": 6, "clock": 18, "rug": 75, "vase": 15}
RATES = {"GBP": 1.0, "EUR": 1.2, "USD": 1.25, "CHF": 1.1}  # units of each currency for one pound
FACTORS = {("km", "m"): 1000, ("kg", "g"): 1000, ("hours", "minutes"): 60, ("feet", "inches"): 12}
CAPITALS = {
    "Italy": "Rome",
    "Norway": "Oslo",
    "France": "Paris",
    "Germany": "Berlin",
    "England": "London",
}
WORDS = {
    "arid": "very dry, with little rain",
    "brisk": "quick and full of energy",
    "candid": "honest and open",
    "frugal": "careful with money",
    "lucid": "clear and easy to understand",
    "novice": "a person who is new to a task",
    "serene": "calm and peaceful",
    "vivid": "bright and full of life",
}
MINUTES_PAST = {"York": 10, "Leeds": 25, "Bath": 40, "Dover": 55}  # one train an hour
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
EVENTS = ("concert", "exam", "market", "match", "wedding")


class Tool(NamedTuple):
    """A tool: its description and parameters for the prompt, and the function that runs it."""

    description: str
    parameters: dict[str, str]
    run: Callable[..., str]


def calculate(expression: str) -> str:
    """The value of ``a op b`` over whole numbers, op one of + - *."""
    left, operator, right = expression.split()
    a, b = int(left), int(right)
    return str({"+": a + b, "-": a - b, "*": a * b}[operator])


def exchange(amount: int, source: str, target: str) -> str:
    """An amount of money in another currency, to the cent."""
    return f"{amount / RATES[source] * RATES[target]:.2f} {target}"


def next_train(to: str, after: str) -> str:
    """The first hourly train to a city at or after a time of day."""
    hour, minute = (int(part) for part in after.split(":"))
    hour += minute > MINUTES_PAST[to]
    return f"{hour:02d}:{MINUTES_PAST[to]:02d}"


def days_between(start: str, end: str) -> str:
    """The number of days from one ISO date to another."""
    return str((date.fromisoformat(end) - date.fromisoformat(start)).days)


TOOLS = {
    "weather": Tool(
        "the weather in a city today",
        {"city": "string"},
        lambda city: f"{DEGREES[city]} °C, {SKY[city]}",
    ),
    "calculator": Tool("computes a op b", {"expression": "string"}, calculate),
    "price": Tool(
        "the price of an item in pounds", {"item": "string"}, lambda item: str(PRICES[item])
    ),
    "convert": Tool(
        "converts a value to a smaller unit",
        {"value": "number", "source": "string", "target": "string"},
        lambda value, source, target: f"{value * FACTORS[source, target]} {target}",
    ),
    "exchange": Tool(
        "converts money", {"amount": "number", "source": "string", "target": "string"}, exchange
    ),
    "weekday": Tool(
        "the day of the week of a date",
        {"day": "string"},
        lambda day: WEEKDAYS[date.fromisoformat(day).weekday()],
    ),
    "days_between": Tool("counts days", {"start": "string", "end": "string"}, days_between),
    "dictionary": Tool("the meaning of a word", {"word": "string"}, lambda word: WORDS[word]),
    "next_train": Tool("the next train to a city", {"to": "string", "after": "string"}, next_train),
    "capital": Tool(
        "the capital of a country", {"country": "string"}, lambda country: CAPITALS[country]
    ),
}


class Trajectory:
    """A solved question: the tools that were called, and the text of the assistant turn."""

    def __init__(self, question: str) -> None:
        self.question = question
        self.called: list[str] = []
        self.text = ""

    def call(self, thought: str, tool: str, **arguments: str | int) -> str:
        """Runs a tool; writes thought, action and observation; returns the observation."""
        observation = TOOLS[tool].run(**arguments)
        self.called.append(tool)
        self.text += (
            f"Thought: {thought}\nAction: {tool}\nAction Input: {json.dumps(arguments)}\n"
            f"Observation: {observation}\n"
        )
        return observation

    def finish(self, answer: str, thought: str = "I now know the final answer.") -> "Trajectory":
        """Ends the trajectory with its final answer."""
        self.text += f"Thought: {thought}\nFinal Answer: {answer}"
        return self


def weather_today(rng: Random) -> Trajectory:
    city = rng.choice(list(SKY))
    ask = rng.choice(
        ("What is the weather in {} today?", "How is the weather in {}?", "How warm is it in {}?")
    )
    trajectory = Trajectory(ask.format(city))
    seen = trajectory.call(f"I need the weather in {city}.", "weather", city=city)
    return trajectory.finish(f"The weather in {city} today: {seen}.")


def warmer_city(rng: Random) -> Trajectory:
    first, second = rng.sample(list(SKY), 2)
    trajectory = Trajectory(f"Which city is warmer today, {first} or {second}?")
    trajectory.call(f"I need the weather in {first}.", "weather", city=first)
    trajectory.call(f"I need the weather in {second}.", "weather", city=second)
    warmer = max(first, second, key=lambda city: DEGREES[city])
    return trajectory.finish(f"{warmer} is warmer, with {DEGREES[warmer]} °C.")


def capital_weather(rng: Random) -> Trajectory:
    country = rng.choice(list(CAPITALS))
    ask = rng.choice(
        ("What is the weather in the capital of {}?", "How warm is {}'s capital today?")
    )
    trajectory = Trajectory(ask.format(country))
    city = trajectory.call(f"I need the capital of {country}.", "capital", country=country)
    seen = trajectory.call(f"I need the weather in {city}.", "weather", city=city)
    return trajectory.finish(f"The weather in {city}, the capital of {country}: {seen}.")


def arithmetic(rng: Random) -> Trajectory:
    expression = f"{rng.randint(12, 999)} {rng.choice('+-*')} {rng.randint(12, 99)}"
    trajectory = Trajectory(f"What is {expression}?")
    result = trajectory.call("I need to calculate this.", "calculator", expression=expression)
    return trajectory.finish(f"{expression} is {result}.")


def shopping_bill(rng: Random) -> Trajectory:
    item, count = rng.choice(list(PRICES)), rng.randint(3, 30)
    trajectory = Trajectory(f"How much do {count} {item}s cost?")
    price = trajectory.call(f"I need the price of one {item}.", "price", item=item)
    total = trajectory.call("I need to multiply.", "calculator", expression=f"{count} * {price}")
    return trajectory.finish(f"{count} {item}s cost £{total}.")


def price_gap(rng: Random) -> Trajectory:
    cheap, dear = sorted(rng.sample(list(PRICES), 2), key=lambda item: PRICES[item])
    trajectory = Trajectory(f"How much more does a {dear} cost than a {cheap}?")
    high = trajectory.call(f"I need the price of the {dear}.", "price", item=dear)
    low = trajectory.call(f"I need the price of the {cheap}.", "price", item=cheap)
    gap = trajectory.call("I need to subtract.", "calculator", expression=f"{high} - {low}")
    return trajectory.finish(f"A {dear} costs £{gap} more than a {cheap}.")


def unit_conversion(rng: Random) -> Trajectory:
    source, target = rng.choice(list(FACTORS))
    value = rng.randint(2, 90)
    trajectory = Trajectory(f"How many {target} are {value} {source}?")
    result = trajectory.call(
        f"I need to convert {source} to {target}.",
        "convert",
        value=value,
        source=source,
        target=target,
    )
    return trajectory.finish(f"{value} {source} are {result}.")


def money(rng: Random) -> Trajectory:
    source, target = rng.sample(list(RATES), 2)
    amount = 5 * rng.randint(2, 60)
    trajectory = Trajectory(f"Convert {amount} {source} to {target}.")
    result = trajectory.call(
        f"I need to convert {source} to {target}.",
        "exchange",
        amount=amount,
        source=source,
        target=target,
    )
    return trajectory.finish(f"{amount} {source} are {result}.")


def day_of_week(rng: Random) -> Trajectory:
    event, day = rng.choice(EVENTS), date(2025, 1, 1) + timedelta(days=rng.randrange(700))
    trajectory = Trajectory(f"The {event} is on {day}. Which day of the week is that?")
    name = trajectory.call(f"I need the weekday of {day}.", "weekday", day=str(day))
    return trajectory.finish(f"The {event} is on a {name}.")


def waiting_days(rng: Random) -> Trajectory:
    event, today = rng.choice(EVENTS), date(2025, 1, 1) + timedelta(days=rng.randrange(600))
    day = today + timedelta(days=rng.randint(5, 90))
    trajectory = Trajectory(f"Today is {today}. How many days are left until the {event} on {day}?")
    days = trajectory.call(
        "I need to count the days.", "days_between", start=str(today), end=str(day)
    )
    return trajectory.finish(f"There are {days} days left until the {event}.")


def word_meaning(rng: Random) -> Trajectory:
    word = rng.choice(list(WORDS))
    ask = rng.choice(('What does "{}" mean?', 'Define the word "{}".', 'Explain "{}" to me.'))
    trajectory = Trajectory(ask.format(word))
    meaning = trajectory.call(f'I need the meaning of "{word}".', "dictionary", word=word)
    return trajectory.finish(f'"{word}" means: {meaning}.')


def train_time(rng: Random) -> Trajectory:
    city, after = (
        rng.choice(list(MINUTES_PAST)),
        f"{rng.randint(6, 21):02d}:{rng.randrange(0, 60, 5):02d}",
    )
    trajectory = Trajectory(f"It is {after}. When does the next train to {city} leave?")
    leaves = trajectory.call(
        f"I need the next train to {city}.", "next_train", to=city, after=after
    )
    return trajectory.finish(f"The next train to {city} leaves at {leaves}.")


def no_tool(rng: Random) -> Trajectory:
    question, answer = rng.choice(
        (
            ("Hello, who are you?", "I am an assistant that solves tasks with tools."),
            ("Thank you for your help!", "You are welcome!"),
            ("What is the opposite of cold?", "The opposite of cold is hot."),
            ("Which colour do you get from red and white?", "Red and white give pink."),
            ("How many legs does a dog have?", "A dog has four legs."),
            ("What is the first letter of the alphabet?", "The first letter is A."),
            ("What comes after Monday?", "Tuesday comes after Monday."),
            ("Say good morning in French.", "In French, good morning is bonjour."),
            ("Which season follows winter?", "Spring follows winter."),
            ("How many months are in a year?", "There are 12 months in a year."),
        )
    )
    return Trajectory(question).finish(answer, thought="I can answer this without a tool.")


SCENARIOS = (
    weather_today,
    warmer_city,
    capital_weather,
    arithmetic,
    shopping_bill,
    price_gap,
    unit_conversion,
    money,
    day_of_week,
    waiting_days,
    word_meaning,
    train_time,
    no_tool,
)


def _prompt(rng: Random, trajectory: Trajectory) -> str:
    """The user turn: the tools that are called, one or two others, the format, the question."""
    called = list(dict.fromkeys(trajectory.called))
    others = [name for name in TOOLS if name not in called]
    names = called + rng.sample(others, 3 - len(called) if called else 2)
    rng.shuffle(names)
    tools = "\n".join(
        f"{name}: {TOOLS[name].description} Parameters: {json.dumps(TOOLS[name].parameters)}"
        for name in names
    )
    return (
        f"Answer the question using these tools:\n\n{tools}\n\nUse this format:\n"
        f"Question: ...\nThought: ...\nAction: one of [{', '.join(names)}]\nAction Input: ...\n"
        f"Observation: ...\nFinal Answer: ...\n\nQuestion: {trajectory.question}"
    )


def tool_pairs(rng: Random, per_scenario: int) -> list[tuple[str, str]]:
    """Distinct trajectories, `per_scenario` of each scenario, as (user turn, assistant turn)."""
    pairs: dict[str, str] = {}
    while len(pairs) < per_scenario * len(SCENARIOS):
        trajectory = SCENARIOS[len(pairs) % len(SCENARIOS)](rng)
        pairs[_prompt(rng, trajectory)] = trajectory.text
    return list(pairs.items())
