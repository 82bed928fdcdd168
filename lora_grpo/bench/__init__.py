"""The benchmark suite: native hot-swap against merging, for speed, memory and truth.

settings              what is asked for
schema                the JSON that comes of it, and its tables
shapes, host          models made on the spot, what they need, and the machine
strategies/           one way from trainer to engine a file; the only place where anything is merged
process, prepared     a strategy alive in its own process, and what is given to all work there
levels                what a process takes now
timing                seconds by phase, and how fast bytes can cross at all
turns                 strategies one after another on one device, and how their rows compare
plan, runner          which processes measure what, in which order; what was measured survives a cut-off
sync, proofs, memory, decode, fidelity, step, rollback, endurance
                      one measurement a file: its plan, what a worker does for it, and its rows of the tables
breakeven, report, plots, compare
                      what the figures say
"""
