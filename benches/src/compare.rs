//! The method: every server in turn, round after round, under the same load.

use std::path::PathBuf;

use crate::Result;
use crate::peers::Peer;
use crate::report::{Figures, Row, Sample, Section};

/// Who takes part in a comparison.
#[derive(Clone, Debug)]
pub enum Contender {
    Peer(Peer),
    /// A build of Tidegate; more than one may take part.
    Tidegate {
        label: String,
        binary: PathBuf,
    },
}

impl Contender {
    pub fn name(&self) -> &str {
        match self {
            Contender::Peer(peer) => peer.name(),
            Contender::Tidegate { label, .. } => label,
        }
    }
}

/// What was asked for on the command line.
pub struct Options {
    pub seconds: f64,
    pub rounds: usize,
    /// Name and path of each build of Tidegate; ratios are the first's.
    pub builds: Vec<(String, PathBuf)>,
    /// Only loads whose name contains this.
    pub filter: String,
}

impl Options {
    /// Peers first, then ours: A B A B. Peers that are missing are named in the section.
    pub fn contenders(&self, peers: &[Peer], section: &mut Section) -> Vec<Contender> {
        let mut contenders = Vec::new();
        for &peer in peers {
            if peer.is_installed() {
                contenders.push(Contender::Peer(peer));
            } else {
                section.remarks.push(format!("{} is missing: `{}`.", peer.name(), peer.install()));
            }
        }
        contenders.extend(self.own());
        contenders
    }

    pub fn own(&self) -> impl Iterator<Item = Contender> + '_ {
        self.builds.iter().map(|(label, binary)| Contender::Tidegate { label: label.clone(), binary: binary.clone() })
    }

    pub fn wants(&self, load: &str) -> bool {
        load.contains(&self.filter)
    }

    /// Runs `measure` for every contender in turn and adds a row for each. `bars` says what Tidegate's CPU time may be, as a part of a peer's.
    pub fn compare(
        &self,
        section: &mut Section,
        load: &str,
        contenders: &[Contender],
        bars: &[(Peer, f64)],
        mut measure: impl FnMut(&Contender) -> Result<Sample>,
    ) {
        if !self.wants(load) {
            return;
        }
        let mut samples: Vec<std::result::Result<Vec<Sample>, String>> =
            contenders.iter().map(|_| Ok(Vec::new())).collect();
        for round in 1..=self.rounds {
            for (contender, collected) in contenders.iter().zip(&mut samples) {
                let Ok(runs) = collected else { continue };
                eprintln!("{load}: {} ({round}/{})", contender.name(), self.rounds);
                match measure(contender) {
                    Ok(sample) => runs.push(sample),
                    Err(error) => *collected = Err(error.to_string()),
                }
            }
        }
        let outcomes: Vec<_> = samples
            .into_iter()
            .map(|runs| runs.and_then(|runs| Figures::of(&runs).ok_or_else(|| "no work was done".to_owned())))
            .collect();
        let ours = contenders
            .iter()
            .zip(&outcomes)
            .find(|(contender, _)| matches!(contender, Contender::Tidegate { .. }))
            .and_then(|(_, outcome)| outcome.as_ref().ok().map(|figures| figures.cpu_us));
        for (contender, outcome) in contenders.iter().zip(outcomes) {
            let ratio = ours.zip(outcome.as_ref().ok()).map(|(ours, figures)| ours / figures.cpu_us);
            let bar = bars.iter().find(|(peer, _)| matches!(contender, Contender::Peer(this) if this == peer));
            section.rows.push(Row {
                load: load.to_owned(),
                server: contender.name().to_owned(),
                outcome,
                ratio,
                bar: bar.map(|(_, bar)| *bar),
            });
        }
    }
}
