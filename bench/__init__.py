"""What a change costs a judge: benchmarks run, compared, swept and timed; imported as `gramlite.bench`.

    suites/     a benchmark a file, found by its name
    run         judges a suite into a run folder (`work`: which pairs; `folder`: what lies on disk)
    compare     runs against a base run: `measures` and `statistics` make a `comparison`, which a `gate` tests
    report      the page, whose frame, style and script lie in `page/`; `summary` has its tables and sentences
    sweep       makes a judge in many types (`variants`, `builder`), judges and compares them all
    speed       times a judge beside its neighbours
    claims/     scripts that prove our own figures; not packaged

It may import everything below the commands, and `gramlite.export` and `gramlite.quant`. Every table is a `table.Table`.
"""
