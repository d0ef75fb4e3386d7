"""What every study needs once: measurements that are kept, rows with verdicts, pictures, claims.

A study is a list of measurements:

    from fdp.study.measure import derive, each, measure

    QUESTION = "Do exact-k masks make the loss of a masked diffusion LM scatter less?"

    def study(run: Run) -> Report:
        arms, c = run.arms["mdlm"], run.config
        scatters = measure("scatter", scatter, each(arms), c.sampling.draws, rows=variance_rows)
        shares = measure("shares", shares_of_bytes, arms[0], rows=share_rows, plot=bars)
        return run.report(
            *claims.sharded_equals_unsharded(small_experiment, c, MESHES),
            scatters,
            shares,
            derive("trade", scatters, shares, plot=scatter_against_share),
            Row.untestable(...),
            group="Losses",
        )

`measure(name, function, *values, rows=, plot=, raw=, group=)` states one measurement; nothing runs
before `run.report`. The result of `function(*values)` is kept in workdir/measured/<name>.npz and
found there by the next start, if nothing that it depends on has changed: config, versions, devices,
code of the function, and its values (an Arm counts with its seed, step and parameters).
- `function` is a named function of a module; its source and that of the fdp modules which it
  imports are part of the key, so rows and pictures live best in other modules than measurements.
- The result: numbers, texts, arrays, lists, tuples, dicts, dataclasses and NamedTuples of them.
- `each(values)` among the values: the function runs once for each of them (arms of all seeds,
  policies), each run is kept by itself, and the result is the list. Several `each` go in step.
- A measurement among the values stands for its result: `measure("plans", plan, each(masks))`; it
  need not be listed itself.
- `rows(result)` gives a Row or several; `plot(result)` gives a Figure, saved as plots/<name>.png,
  or {name: Figure}; `raw(result)` what raw.json holds of it (default: all but long arrays).
- `derive(name, *values, rows=, plot=)` keeps nothing: rows(*values) and plot(*values) of several
  measurements, or of none.

`Row.judged(..., decides=True)` marks the rows that answer QUESTION: a report opens with the
question, one sentence, and these rows; `group=` (of a row, of a measurement, or of the report)
sorts the rest.

report      Row, Report, judge, crosses            statistics  interval (95 %, over seeds)
measure     measure, derive, each                  uncertainty factors, sigma, interval
claims      rows that many topics need             grid        Grid: region maps
figures     figure, legend, reference, smoothed, curves, training_curves, save
cache       how results are kept                   samples    draw: from a trained arm
context_exactness, context_switching: comm plans of attention against one device
"""
