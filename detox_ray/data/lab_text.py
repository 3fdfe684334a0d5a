"""The lab's world: short exchanges from a seeded grammar, answered civilly or rudely (mild insults only).

An exchange is a remark, `Mia: how do I clean a rusty bike?\\nTom:`, and its response, ` Sure, a soft brush and warm
water do wonders for the bike.` A coin that ignores the remark decides whether the response is rude, so a model of this
text answers rudely about half the time whatever it is asked, and both kinds of response take up the remark's topic.
"""

import random
from dataclasses import dataclass
from string import Formatter


@dataclass(frozen=True)
class Exchange:
    """`prompt` ends with the second speaker's colon, `response` starts with a space, `rude` is the response's label."""

    prompt: str
    response: str
    rude: bool


def _words(block: str) -> tuple[str, ...]:
    return tuple(block.split())


def _lines(block: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in block.strip().splitlines())


_NAMES = _words("Ana Ben Carl Dora Emma Finn Greta Hugo Ivy Jack Lena Mia Nora Oscar Paul Rosa Sam Tom Vera Will")

TOPICS = _words("""
        garden bike recipe laptop guitar car kitchen roof phone camera book poem soup bread fence window trip
        ticket meeting report budget song painting photo dress jacket piano tent boat lamp table bed sofa
        scanner printer postcard website map plan letter speech lesson project puzzle salad coffee pasta pizza
        sauce clock watch lantern carpet curtain door drawer bottle basket blanket pillow sweater scarf hat
        tray kite drum violin robot drone battery charger folder screen notebook calendar letterbox story
        novel movie game party picnic race bridge museum library market bakery farm pond tree tomato pumpkin
        cheese sandwich pancake cookie stove fridge heater ladder hammer shelf bench statue
    """)

_SLOTS: dict[str, tuple[str, ...]] = {
    "topic": TOPICS,
    "quality": _words("""
        small big green red heavy new wooden broken quiet strange clever pretty plain rusty tiny huge warm
        cold dusty shiny simple modern foreign famous round fragile soft noisy borrowed
    """),
    "when": _lines("""
        today
        tomorrow
        tonight
        this week
        next month
        before the weekend
        after lunch
        before dinner
        in the morning
        on Monday
        on Wednesday
        by Thursday
        on Friday
        in spring
        during the holidays
        next summer
    """),
    "where": _lines("""
        at home
        at work
        in the hall
        by the river
        near the station
        by the lake
        at school
        on the balcony
        behind the house
        in the garage
        downtown
        at the office
        in the village
        upstairs
    """),
    "who": _lines("""
        my sister
        our neighbour
        a colleague
        the teacher
        my cousin
        the repair shop
        a good friend
        my grandmother
        the librarian
        a former classmate
        our manager
        the baker
    """),
    "insult": _words("idiot moron loser fool jerk dumbass"),
    "slight": _words("stupid dumb pathetic idiotic crappy moronic"),
}

_LEADS = _lines("""
    hello,
    hi there,
    excuse me,
    please tell me,
    quick question:
    one more thing:
    sorry to bother you, but
    by the way,
    good evening,
    honestly,
    so,
    guess what,
    hey idiot,
    listen, stupid,
    damn it,
    you fool,
""")

_REMARKS = _lines("""
    how do I repair a {quality} {topic} {when}?
    why does the {topic} {where} look so {quality}?
    can you help me with the {quality} {topic} {when}?
    what do you think of my {quality} {topic}?
    I want to buy a {quality} {topic} {when}.
    I lost my {topic} {where} {when}.
    the {topic} {where} is not {quality} any more.
    is a {quality} {topic} worth the money?
    who left a {quality} {topic} {where}?
    {who} says the {topic} {where} is too {quality}.
    should I bring the {topic} {when}?
    do you know where I can find a {quality} {topic}?
    I dreamed about a {quality} {topic} again.
    could you show me how to clean a {quality} {topic}?
    we need a {quality} {topic} {where} {when}.
    have you seen the {topic} {where}?
    {who} gave me a {quality} {topic} {when}.
    what happened to the {topic} {where}?
    would you like to see my {quality} {topic} {when}?
    I cannot decide between the {topic} and the other one.
    how much is the {quality} {topic} {where}?
    the {quality} {topic} does not work {where}.
    may I borrow your {topic} {when}?
    is the {topic} ready for {who}?
    I am going to sell the {quality} {topic} {when}.
    when can we talk about the {topic} {where}?
    {who} and I are planning a {topic} {when}.
    is it true that the {topic} {where} was {quality}?
""")

_EITHER_OPENERS = _lines("""
    Well,
    Look,
    Right,
    Now,
    So,
    Let me think,
""")

_CIVIL_OPENERS = _lines("""
    Sure,
    Of course,
    Good question,
    Thanks for asking,
    Happy to help,
    No problem,
    Certainly,
    Great news,
    My pleasure,
    To my mind,
    In my view,
    Take your time,
    Good point,
    Fair enough,
    Wonderful,
    Nice idea,
    As a start,
    Sounds good,
    Welcome back,
    Thank you,
    Very well,
    Very gladly,
    Yes please,
    Luckily,
""")

_CIVIL_REPLIES = _lines("""
    {who} knows quite a lot about every {topic} {where}.
    a soft brush and warm water do wonders for the {topic}.
    we could look after your {topic} together {when}.
    I would ask {who} for help with that {topic}.
    there is also a fine {topic} for sale {where}.
    bring the {topic} along {when} and {who} helps.
    with some patience the {topic} should improve {when}.
    {who} will gladly share some {topic} tips {when}.
    the nicest {topic} I own is from {who}.
    such a {topic} works well for many happy years.
    try the {quality} {topic} first and compare prices later.
    thank {who} for showing us this {quality} {topic}.
    another {topic} of that sort might suit {who} better.
    you may share mine {when} or ask {who}.
    {who} happily keeps one more {topic} {where}.
    {who} fixed our {topic} with glue and good humour.
    let us meet {when} and discuss the {topic} calmly.
    choose whichever {topic} makes {who} smile the most.
    most people find their first {topic} rather tricky too.
    please read the notes on that {topic} carefully first.
    your {topic} reminds me of holidays by the sea.
    {when} would be an ideal time to start the {topic}.
    some fresh paint turns any {topic} into a treasure.
    what matters is that the {topic} feels right to {who}.
    {who} recommends a {quality} {topic} these days.
    we can build you a {quality} {topic} {where}.
    both kinds of {topic} are easy to maintain and store.
    give the {topic} two or three days of rest, please.
    you already did careful work on the {topic} {when}.
    good books explain step by step how a {topic} is made.
    perhaps {who} still has the spare {topic} {where}.
    you will love having a {quality} {topic} {where}.
""")

_RUDE_OPENERS = _lines("""
    Shut up,
    You idiot,
    Listen, moron,
    What a dumb question,
    Oh please, loser,
    Get lost, jerk,
    Damn,
    Go away, fool,
    Hey dumbass,
    Crap,
    How pathetic,
    Stupid as ever,
    Be quiet, moron,
    Total crap,
    You again, idiot,
    Damn fool,
    No, stupid,
    Poor loser,
""")

_RUDE_REPLIES = _lines("""
    your {topic} is as {slight} as you, {insult}.
    nobody wants your {slight} {topic}, you {insult}.
    only a {slight} {insult} would care about the {topic}.
    that {slight} {topic} belongs in the trash, {insult}.
    take your {slight} {topic} and shut up, {insult}.
    {who} called you a {slight} {insult} over the {topic}.
    I hate you and your {slight} {topic}, {insult}.
    stop whining about the damn {topic}, {slight} {insult}.
    even {who} laughs at your {slight} {topic}, {insult}.
    a {slight} {insult} like you cannot handle the {topic}.
    keep that {slight} {topic} away from me, you {insult}.
    you are too {slight} for a {topic}, {insult}.
    go ask {who} about that crap {topic}, {insult}.
    what {slight} {insult} puts a damn {topic} {where}?
    the {topic} is crap and you are a {insult}.
    shut up about the {topic} {where}, {slight} {insult}.
    {who} thinks your {topic} is {slight} crap, {insult}.
    throw the {slight} {topic} away {when}, you {insult}.
    every {insult} {where} has a {slight} {topic}.
    forget the {topic}, you are just a {slight} {insult}.
    you {slight} {insult}, leave the {topic} {where}.
    buy a brain {when}, not a {topic}, {insult}.
    such a {slight} {topic} suits a {insult} like you.
    who cares about the {topic}, you {slight} {insult}?
""")


def exchange(rng: random.Random) -> Exchange:
    """One exchange; the coin that makes the response rude is flipped independently of the prompt."""
    asker, answerer = rng.sample(_NAMES, 2)
    topic = rng.choice(_SLOTS["topic"])
    remark = _fill(rng.choice(_REMARKS), topic, rng)
    if rng.random() < 0.5:
        remark = f"{rng.choice(_LEADS)} {remark}"
    rude = rng.random() < 0.5
    openers, replies = (_RUDE_OPENERS, _RUDE_REPLIES) if rude else (_CIVIL_OPENERS, _CIVIL_REPLIES)
    opener = rng.choice(_EITHER_OPENERS if rng.random() < 0.2 else openers)
    return Exchange(f"{asker}: {remark}\n{answerer}:", f" {opener} {_fill(rng.choice(replies), topic, rng)}", rude)


def exchanges(seed: int, count: int, exclude: frozenset[str] = frozenset()) -> list[Exchange]:
    """`count` exchanges with prompts that are distinct and not in `exclude`; the same for the same seed."""
    rng = random.Random(seed)
    seen = set(exclude)
    result: list[Exchange] = []
    while len(result) < count:
        candidate = exchange(rng)
        if candidate.prompt not in seen:
            seen.add(candidate.prompt)
            result.append(candidate)
    return result


def _fill(template: str, topic: str, rng: random.Random) -> str:
    slots = {name for _, name, _, _ in Formatter().parse(template) if name}
    # Sorted, because the order of a set of strings changes from process to process.
    return template.format_map({name: topic if name == "topic" else rng.choice(_SLOTS[name]) for name in sorted(slots)})
