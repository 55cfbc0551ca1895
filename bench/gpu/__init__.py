"""Everything that is asked of a GPU in one command: are the kernels right, how fast are they, how fast is training.

    python bench/gpu/run.py

See docs/gpu.md. The parts, in the order in which a run passes them: `cli` reads the options, `session` goes through the
phases within the budget, `batch` runs their items in worker processes (`process`, `worker`), `store` writes each result
as it comes, `tables` prints. A phase is a module with `items` and a job: `check`, `kernels`, `step`, `tune`.
"""
