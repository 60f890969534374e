"""A text that would drive a terminal, how it is shown, and which characters drive one."""

import re

# markup that opens, markup that closes nothing, an emoji's name, a window's title set, text turned round, a C1 control, a line end
HOSTILE = "[red]\x1b]0;t\x07\u202e[/b]:bug:\x9b\n"
SHOWN = r"[red]\x1b]0;t\x07\u202e[/b]:bug:\x9b\n"
NAME, NAMED = HOSTILE.replace("/", ""), SHOWN.replace("/", "")  # of a file
DRIVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
