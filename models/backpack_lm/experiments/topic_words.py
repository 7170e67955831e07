"""The 17 topics of the paper's section 6, and the words that each is steered by.

The paper steers by the words of a topic's name alone, the first token of each. Of a small vocabulary those pieces
are other words (“tv” begins with “t”, “gaming” with “g”), and a topic named by one word leaves only that. So each
topic has twelve words that anybody would name for it, those of its name first; the ones that are single tokens
are used, by senses and by the logit bias alike. The lists were written before anything was measured with them.
"""

from __future__ import annotations

TOPIC_WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "arts and culture": "arts culture art painting artist museum theatre literature poetry sculpture "
        "gallery cultural",
        "business and entrepreneurs": "business entrepreneurs company market money investment profit customers "
        "sales entrepreneur product trade",
        "celebrity and pop culture": "celebrity pop culture famous stars fame popular fans actress singer "
        "audience media",
        "diaries and daily life": "diaries daily life day morning home today diary night week routine breakfast",
        "family": "family mother father children parents brother sister son daughter wife husband child",
        "fashion and style": "fashion style dress clothes wear silk shoes hat beauty elegant dressed costume",
        "film, tv and video": "film tv video movie screen television camera scene actor show director films",
        "fitness and health": "fitness health exercise body diet healthy weight physical sleep muscles strength "
        "training",
        "food and dining": "food dining dinner meal bread meat eat cooking kitchen fruit wine restaurant",
        "gaming": "gaming game games play player players cards computer video win score chess",
        "music": "music song piano singing concert band songs musical sing orchestra violin melody",
        "news and social concern": "news social concern government political newspaper report poverty public "
        "crime rights protest",
        "other hobbies": "hobbies hobby garden gardening collecting fishing reading crafts leisure pleasure "
        "collection birds",
        "relationships": "relationships relationship love marriage friend lovers husband wife friendship "
        "together trust partner",
        "sports": "sports sport football team race ball players athletes coach game baseball match",
        "travel and adventure": "travel adventure journey voyage trip mountains island ship road tourists "
        "travelers sail",
        "youth and student life": "youth student life school college students young teacher university class "
        "study campus",
    }.items()
}
