//! Loading again while running: a new snapshot, or the reasons why the old one stays.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::{Config, Inputs, Loaded, Report};

/// What a reload did.
#[derive(Debug)]
pub enum Outcome {
    /// Nothing differs from what runs.
    Unchanged,
    /// The new snapshot is in place. `restart` names the keys that take effect only at the next start.
    Changed { loaded: Box<Loaded>, restart: Vec<&'static str> },
    /// The old snapshot stays.
    Refused(Report),
}

/// Loads `inputs` anew and swaps the snapshot if everything is well; otherwise what runs keeps running.
pub fn reload(inputs: &Inputs, current: &ArcSwap<Config>) -> Outcome {
    let loaded = match super::load(inputs) {
        Ok(loaded) => loaded,
        Err(report) => return Outcome::Refused(report),
    };
    let old = current.load();
    if **old == loaded.config {
        return Outcome::Unchanged;
    }
    let restart = needs_restart(&old, &loaded.config);
    current.store(Arc::new(loaded.config.clone()));
    Outcome::Changed { loaded: Box::new(loaded), restart }
}

/// Keys that are read once, at start.
fn needs_restart(old: &Config, new: &Config) -> Vec<&'static str> {
    let mut keys = Vec::new();
    let mut differs = |key, differs: bool| {
        if differs {
            keys.push(key);
        }
    };
    differs("gateway.name", old.gateway.name != new.gateway.name);
    differs("gateway.data_dir", old.gateway.data_dir != new.gateway.data_dir);
    differs("gateway.workers", old.gateway.workers != new.gateway.workers);
    differs("admin.bind", old.admin.bind != new.admin.bind);
    keys
}
