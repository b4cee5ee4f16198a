//! Any bytes as a datastore: an error, or texts that are searched within bounds, whatever their order claims.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use nybble::format::mapped::MappedFile;
use nybble::speculate::{Datastore, Draft, DraftTree, Retrieval, Statistics, Text};

const VOCAB: usize = 10;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(store) = Datastore::from_file(MappedFile::from_bytes("fuzz", bytes.to_vec()), VOCAB) {
        assert!(8 * store.len() <= bytes.len(), "two words a token");
        for length in 1..4 {
            for token in 0..VOCAB as u32 {
                assert!(store.find(&vec![token; length]).end <= store.len());
            }
        }
        let (mut tree, statistics) = (DraftTree::default(), Statistics::default());
        tree.reset(1);
        let mut retrieval = Retrieval::new(Arc::new(store));
        retrieval.propose(&Text { tokens: &[3, 2, 1] }, &mut tree, &statistics).expect("drafts");
        assert!(tree.nodes().iter().all(|node| (node.token as usize) < VOCAB));
    }
});
