"""Input rows: JSON lines in the shapes that preference data comes in, read one at a time and checked.

`lines` reads a stream, `shapes` makes a pair or an item of an object, `conversations` makes texts of messages, `labels`
reads labels. A bad line never stops the others: it comes out as a row with an error that names its line number.
"""

from .conversations import conversation
from .labels import label_from
from .lines import LINE_LIMIT_BYTES, Line, Row, read_lines, read_rows
from .shapes import SHAPES, Item, item_from_json, pair_from_json

__all__ = [
    "LINE_LIMIT_BYTES",
    "SHAPES",
    "Item",
    "Line",
    "Row",
    "conversation",
    "item_from_json",
    "label_from",
    "pair_from_json",
    "read_lines",
    "read_rows",
]
