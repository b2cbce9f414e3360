"""The chat demo's exam: what a bundle answers within a budget, in a process of the device side alone.

    python samples/chat_answers.py BUNDLE CONVERSATIONS.jsonl BUDGET [ADAPTER]

prints the answers to the conversations, each without its last turn, as JSON.
"""

import json
import sys
from pathlib import Path

import edgepeft


def main() -> None:
    """Answer every conversation; the likeliest token each time."""
    bundle, data, budget, *adapter = sys.argv[1:]
    records = [json.loads(line) for line in Path(data).read_text("utf-8").splitlines()]
    with edgepeft.load(bundle, memory_budget=budget) as device:
        answers = [
            device.generate(
                messages=record["messages"][:-1],
                adapter=adapter[0] if adapter else None,
                max_new_tokens=16,
                temperature=0,
            )
            for record in records
        ]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
