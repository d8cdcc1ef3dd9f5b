//! All migrations of a node, in both directions: the one registry that Get, Watch and List answer from.

use proto_common::error::{CommonReason, Error};
use proto_common::ids::MigrationId;
use proto_common::peer::PeerKey;
use proto_common::registry::{Page, Registry, RegistryLimits, Tracker, Watch};
use proto_common::v1::Direction;

use crate::Reason;
use crate::limits::Limits;
use crate::v1::MigrationProgress;

/// Migrations in one page of a list at most; without their details a page of that many stays below 1 MiB.
const MAX_PAGE: usize = 1000;

/// All migrations of a node; cheap to clone. Source and target of one node share it.
#[derive(Debug, Clone)]
pub struct Migrations {
    registry: Registry<MigrationProgress>,
}

impl Default for Migrations {
    fn default() -> Self {
        Self::new(&Limits::default())
    }
}

impl Migrations {
    /// None yet; finished ones are remembered as `limits` say.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let registry = Registry::new(RegistryLimits {
            finished: limits.history,
            watchers: limits.watchers,
            watchers_per_peer: limits.watchers_per_peer,
            page: MAX_PAGE,
            ..RegistryLimits::default()
        });
        Self { registry }
    }

    /// Takes over those that ended in an earlier process, oldest first.
    pub fn seed(&self, finished: Vec<MigrationProgress>) {
        let seed = finished.into_iter().map(|migration| {
            let direction = migration.direction();
            (direction, migration.migration_id.clone(), migration)
        });
        self.registry.seed(seed);
    }

    /// Those that have not ended, in that direction or both.
    #[must_use]
    pub fn active(&self, direction: Option<Direction>) -> Vec<MigrationProgress> {
        let wanted = |of: Direction, migration: &MigrationProgress| {
            direction.is_none_or(|wanted| wanted == of) && !migration.is_final()
        };
        let (mut all, mut token) = (Vec::new(), String::new());
        // Only a token of another registry is refused.
        while let Ok(Page { items, next_page_token }) = self.registry.list(wanted, 0, &token) {
            all.extend(items);
            token = next_page_token;
            if token.is_empty() {
                break;
            }
        }
        all
    }

    /// One migration; of two with the ID, the outgoing one unless a direction is given.
    ///
    /// # Errors
    ///
    /// `MIGRATION_NOT_FOUND`.
    pub fn get(&self, direction: Option<Direction>, id: &MigrationId) -> Result<MigrationProgress, Error> {
        self.registry.get(self.meant(direction, id), id.as_str()).ok_or_else(|| not_found(id))
    }

    /// The direction that a caller means who leaves it open.
    pub(crate) fn meant(&self, direction: Option<Direction>, id: &MigrationId) -> Option<Direction> {
        let known = |direction| self.registry.get(Some(direction), id.as_str()).is_some();
        direction.or_else(|| known(Direction::Out).then_some(Direction::Out))
    }

    pub(crate) fn watch(
        &self,
        peer: &PeerKey,
        direction: Option<Direction>,
        id: &MigrationId,
    ) -> Result<Watch<MigrationProgress>, Error> {
        self.registry.watch_for(peer, self.meant(direction, id), id.as_str()).map_err(|error| {
            if error.is(CommonReason::LimitExceeded) {
                error.under(Reason::TooManyWatchers)
            } else {
                not_found(id)
            }
        })
    }

    pub(crate) fn list(
        &self,
        direction: Option<Direction>,
        active_only: bool,
        page_size: u32,
        page_token: &str,
    ) -> Result<Page<MigrationProgress>, Error> {
        let size = if page_size == 0 { 100 } else { page_size };
        let wanted = |of: Direction, migration: &MigrationProgress| {
            direction.is_none_or(|wanted| wanted == of) && !(active_only && migration.is_final())
        };
        let mut page = self.registry.list(wanted, size, page_token)?;
        page.items = page.items.into_iter().map(MigrationProgress::without_details).collect();
        Ok(page)
    }

    pub(crate) fn insert(&self, progress: MigrationProgress) -> Result<Tracker<MigrationProgress>, Error> {
        let id = progress.migration_id.clone();
        self.registry.insert(progress.direction(), &id, progress)
    }

    /// The same of one that an earlier process left: a full registry keeps no node from starting.
    pub(crate) fn readopt(&self, progress: MigrationProgress) -> Result<Tracker<MigrationProgress>, Error> {
        let id = progress.migration_id.clone();
        self.registry.readopt(progress.direction(), &id, progress)
    }
}

pub(crate) fn not_found(id: &MigrationId) -> Error {
    Reason::MigrationNotFound
        .error(format!("this node knows no migration {id}, neither active nor in its history"))
        .metadata("migration_id", id.as_str())
}
