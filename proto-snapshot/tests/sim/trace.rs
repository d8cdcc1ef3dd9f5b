//! What happened in a simulation, in order, with the simulated time of each.

use std::fmt::Display;
use std::sync::{Arc, Mutex};

/// Clones are the same trace.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    lines: Arc<Mutex<Vec<String>>>,
}

impl Trace {
    /// From within a host.
    pub fn add(&self, what: impl Display) {
        let at = turmoil::sim_elapsed().unwrap_or_default();
        self.lines.lock().unwrap().push(format!("{:>9.3} {what}", at.as_secs_f64()));
    }

    pub fn count(&self, part: &str) -> usize {
        self.lines.lock().unwrap().iter().filter(|line| line.contains(part)).count()
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }
}
