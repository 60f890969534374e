"""Input rows: JSON lines in the shapes that preference data comes in, read one at a time and checked.

`lines` reads a stream, `shapes` makes a pair or an item of an object, `conversations` makes texts of messages, `labels`
reads labels. A bad line never stops the others: it comes out as a row with an error that names its line number.
"""

from .conversations import conversation
from .labels import LabelError, Labels, label_from, label_of, parse_labels
from .lines import LINE_LIMIT_BYTES, Line, Row, read_labelled, read_lines, read_rows
from .shapes import SHAPES, Item, item_from_json, pair_from_json

__all__ = [
    "LINE_LIMIT_BYTES",
    "SHAPES",
    "Item",
    "LabelError",
    "Labels",
    "Line",
    "Row",
    "conversation",
    "item_from_json",
    "label_from",
    "label_of",
    "pair_from_json",
    "parse_labels",
    "read_labelled",
    "read_lines",
    "read_rows",
]
