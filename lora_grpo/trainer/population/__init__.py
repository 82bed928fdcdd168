"""Many runs on one engine and one base, whose completions are sampled in one batch."""
