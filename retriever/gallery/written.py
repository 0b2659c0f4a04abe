"""How a language model would write the vokens of one picture for a query."""

from collections.abc import Iterator, Sequence

import torch

from models.decoding import Scoring, Writer
from models.voken_lm import Memory
from tools.errors import BadInput

from ..index import SearchLevel
from .answers import Step, Voken


def written_vokens(
    writer: Writer, memory: Memory, levels: Sequence[SearchLevel], codes: Sequence[int], *, top: int, scoring: Scoring
) -> Iterator[Step]:
    """The vokens of a picture level by level: one beam that goes where it is told.

    Args:
        memory: of the query alone.
        top: alternatives at each level.

    Raises:
        BadInput: no picture of the index has these codes.
    """
    if len(codes) != len(levels):
        raise BadInput(f"a picture has {len(levels)} codes, not {len(codes)}")
    lm = writer.lm
    session = writer.begin(memory)
    states, node = session.open(), torch.zeros(1, dtype=torch.long, device=lm.device)
    for number, (level, code) in enumerate(zip(levels, codes, strict=True)):
        children = level.children(node)
        allowed = children.codes[children.exist]
        place = (allowed == code).nonzero().flatten()
        if not len(place):
            raise BadInput(f"no picture of the index has the codes {tuple(codes)}: {code} is none at level {number}")
        scores = writer.head.log_probabilities(states, number, scoring)[0, 0, allowed]
        shares = scores.softmax(dim=0)
        names = lm.space.tokens[lm.space.level_rows(number)]
        options = [
            Voken(names[each], each, share) for each, share in zip(allowed.tolist(), shares.tolist(), strict=True)
        ]
        order = torch.argsort(-scores, stable=True)[:top].tolist()
        yield Step(options[int(place)], float(scores[place]), len(options), [options[each] for each in order])
        node = children.nodes[children.exist][place]
        if number + 1 < len(codes):
            token = lm.level_offsets[number] + code
            states = session.advance(token.view(1, 1).to(lm.device), torch.zeros_like(node).view(1, 1))
