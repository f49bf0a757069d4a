//! The product.
use std::sync::Arc;
use libtest_mimic::Trial;
use crate::Fixture;
pub(crate) fn trials(_fixture: &Arc<Fixture>) -> Vec<Trial> { Vec::new() }
