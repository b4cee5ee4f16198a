"""Image encoders with published weights: converted, compared with other engines, and timed."""
