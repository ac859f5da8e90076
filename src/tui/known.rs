//! [`Known`]: what earlier runs on this machine measured of a session's model, so that its results are there at once
//! when it is opened again.

use std::path::{Path, PathBuf};

use super::measurements::{Measurements, Origin};
use crate::checkpoint::{Layout, STRATA_FILE, VariantManifest};
use crate::eval::Evaluated;
use crate::session::Session;
use crate::session::runs::{Run, State};

/// A variant of an earlier run, still on disk.
#[derive(Debug)]
struct Row {
    origin: Origin,
    path: PathBuf,
    manifest: VariantManifest,
    result: Option<Evaluated>,
}

/// Results of earlier runs.
#[derive(Debug, Default)]
pub struct Known {
    base: Option<Evaluated>,
    /// The oldest first.
    rows: Vec<Row>,
    /// Runs that go on in other processes, and runs that were interrupted.
    pub going_on: usize,
    pub interrupted: usize,
}

impl Known {
    /// Reads the runs of `root` whose model, sample and evaluation are those of `session`.
    pub fn read(root: &Path, session: &Session, layout: &Layout) -> Self {
        let mut known = Self::default();
        for status in Run::list(root).into_iter().rev() {
            known.going_on += usize::from(!status.state.is_over());
            known.interrupted += usize::from(status.state == State::Interrupted);
            // A run that cannot be read has nothing to tell.
            let Ok(run) = Run::find(root, &status.id) else { continue };
            let Ok(other) = run.session() else { continue };
            if (&other.model, &other.calibration, &other.evaluate) == (&session.model, &session.calibration, &session.evaluate) {
                known.take(&run, &other, layout);
            }
        }
        known
    }

    fn take(&mut self, run: &Run, session: &Session, layout: &Layout) {
        let made = run.made();
        for variant in &session.variants {
            let Some(path) = made.variants.get(&variant.name) else { continue };
            let (Ok((recipe, plan)), Ok(manifest)) = (variant.plan(layout), VariantManifest::read(&path.join(STRATA_FILE))) else {
                continue;
            };
            // A recipe file may have changed since. What measurement found lies in the manifest only.
            if manifest.plan == plan || recipe.allocate.is_some() {
                let result = made.results.iter().find(|result| result.result.variant == variant.name).cloned();
                let origin = Origin::new(&recipe, &plan, &variant.overrides);
                self.rows.push(Row { origin, path: path.clone(), manifest, result });
            }
        }
        if let Some(base) = made.results.into_iter().find(|result| result.result.variant == "base") {
            self.base = Some(base);
        }
    }

    /// Puts what is known in; what was measured since the start stays.
    pub fn recall(self, measurements: &mut Measurements) {
        if let Some(base) = self.base.filter(|_| measurements.base.is_none()) {
            measurements.base_evaluated(base);
        }
        for row in self.rows {
            let newer = measurements.find(&row.origin).is_some_and(|measured| measured.result.is_some());
            if !newer {
                measurements.quantized(&row.origin, row.path, &row.manifest);
                if let Some(result) = row.result {
                    measurements.evaluated(&row.origin, result);
                }
            }
        }
    }
}
