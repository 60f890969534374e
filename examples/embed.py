"""Judge one pair and a few more from inside a program: python examples/embed.py"""

import gramlite

with gramlite.load(settings=gramlite.Settings(budget=256)) as judge:  # or gramlite.load("your-judge.Q4_K_M.gguf")
    verdict = judge(
        prompt="What is the boiling point of water at sea level?",
        response_a="100 °C, or 212 °F.",
        response_b="It depends, but around 80 °C.",
    )
    print(f"Response {verdict.winner} is better, p(A) = {verdict.p_a:.2f}")
    print(verdict.rationale)

    quick = judge.with_settings(mode="direct")  # no rationale: one forward pass an order
    pairs = [
        gramlite.Pair("Name a prime number.", "Seven.", "Nine.", id="prime"),
        gramlite.Pair("Say hello in French.", "Hola!", "Bonjour !", id="french"),
    ]
    for verdict in quick.many(pairs):
        print(
            verdict.id,
            verdict.winner,
            f"{verdict.p_a:.2f}",
            "orders agree" if verdict.consistent else "orders disagree",
        )
