"""Input rows: JSON lines in the shapes that preference data comes in, read one at a time and checked.

`files` makes lines of what lies on disk, `lines` reads them, `shapes` makes a pair or an item of an object,
`conversations` makes texts of messages, `labels` reads labels. A bad line never stops the others: it comes out as a
row with an error that names its line number. `judged_run` judges rows, keeps them (`journal`) and shows them (`display`).
May import judging and what is below it.
"""

from .conversations import conversation
from .files import Lines, check_kind, open_rows
from .labels import LabelError, Labels, label_from, label_of, parse_labels
from .lines import LINE_LIMIT_BYTES, Row, read_labelled, read_lines, read_rows
from .shapes import SHAPES, Item, identifier_of, identifier_text, item_from_json, pair_from_json, puts_better_first

__all__ = [
    "LINE_LIMIT_BYTES",
    "SHAPES",
    "Item",
    "LabelError",
    "Labels",
    "Lines",
    "Row",
    "check_kind",
    "conversation",
    "identifier_of",
    "identifier_text",
    "item_from_json",
    "label_from",
    "label_of",
    "pair_from_json",
    "open_rows",
    "parse_labels",
    "puts_better_first",
    "read_labelled",
    "read_lines",
    "read_rows",
]
