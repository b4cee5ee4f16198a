//! Float tiles.
