//! Key spaces, the tenants that own them, and the slot classes that their blocks live in.

use crate::arena::ClassId;
use crate::policy::Policy;
use crate::{CoreConfig, Millis, Refusal};
use cairn_proto::{KeySpace, SpaceId};
use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) struct Space {
    pub(crate) id: SpaceId,
    /// As declared; unknown while only devices remember the space.
    pub(crate) key: Option<KeySpace>,
    pub(crate) block_bytes: u64,
    pub(crate) class: ClassId,
    pub(crate) resident: u64,
}

pub(crate) struct Class {
    pub(crate) tenant: usize,
    pub(crate) slot_bytes: u64,
    pub(crate) policy: Box<dyn Policy>,
    /// Blocks in host memory.
    pub(crate) blocks: usize,
    /// Those of them without pins.
    pub(crate) evictable: usize,
    /// Room that the policy knows of.
    pub(crate) capacity: usize,
    /// When anything of the class was last asked for or offered.
    pub(crate) used: Millis,
}

pub(crate) struct Tenant {
    pub(crate) name: Arc<str>,
    pub(crate) max_blocks: Option<u64>,
    pub(crate) max_chunks: Option<usize>,
    /// Slots in use: resident, reserved, or removed but still read.
    pub(crate) slots: u64,
}

impl Tenant {
    pub(crate) fn at_quota(&self) -> bool {
        self.max_blocks.is_some_and(|max| self.slots >= max)
    }
}

pub(crate) struct Spaces {
    spaces: Vec<Space>,
    by_id: BTreeMap<SpaceId, u32>,
    pub(crate) classes: Vec<Class>,
    pub(crate) tenants: Vec<Tenant>,
    /// Tenants that are not configured may come.
    open_to_all: bool,
    max: usize,
}

impl Spaces {
    pub(crate) fn new(config: &CoreConfig) -> Self {
        let tenant = |quota: &crate::TenantQuota| Tenant {
            name: quota.name.as_str().into(),
            max_blocks: quota.max_blocks,
            max_chunks: quota.max_chunks,
            slots: 0,
        };
        Self {
            spaces: Vec::new(),
            by_id: BTreeMap::new(),
            classes: Vec::new(),
            tenants: config.tenants.iter().map(tenant).collect(),
            open_to_all: config.tenants.is_empty(),
            max: config.max_spaces,
        }
    }

    pub(crate) fn find(&self, id: &SpaceId) -> Result<u32, Refusal> {
        self.by_id.get(id).copied().ok_or(Refusal::UnknownSpace)
    }

    /// Adds a space in an existing or new class, or completes one that only devices remembered.
    pub(crate) fn open(
        &mut self,
        key: &KeySpace,
        slot_bytes: u64,
        new_class: impl FnOnce(usize) -> (ClassId, Box<dyn Policy>),
    ) -> Result<(), Refusal> {
        let names = (key.id(), &*key.parts().tenant);
        let space = self.enter(names, (key.block_bytes(), slot_bytes), new_class)?;
        self.spaces[space as usize].key.get_or_insert_with(|| key.clone());
        Ok(())
    }

    /// The space with this id, which is added if it is new.
    pub(crate) fn enter(
        &mut self,
        (id, tenant): (SpaceId, &str),
        (block_bytes, slot_bytes): (u64, u64),
        new_class: impl FnOnce(usize) -> (ClassId, Box<dyn Policy>),
    ) -> Result<u32, Refusal> {
        if let Some(space) = self.by_id.get(&id) {
            return Ok(*space);
        }
        if self.spaces.len() >= self.max {
            return Err(Refusal::TooMany { what: "key spaces on this server", max: self.max });
        }
        let tenant = self.tenant(tenant)?;
        let same = |class: &Class| class.tenant == tenant && class.slot_bytes == slot_bytes;
        let class = match self.classes.iter().position(same) {
            Some(position) => ClassId(position as u32),
            None => {
                let (id, policy) = new_class(tenant);
                let used = Millis(0);
                self.classes.push(Class {
                    tenant,
                    slot_bytes,
                    policy,
                    blocks: 0,
                    evictable: 0,
                    capacity: 0,
                    used,
                });
                id
            }
        };
        let space = self.spaces.len() as u32;
        self.by_id.insert(id, space);
        self.spaces.push(Space { id, key: None, block_bytes, class, resident: 0 });
        Ok(space)
    }

    fn tenant(&mut self, name: &str) -> Result<usize, Refusal> {
        if let Some(position) = self.tenants.iter().position(|tenant| &*tenant.name == name) {
            return Ok(position);
        }
        if !self.open_to_all {
            return Err(Refusal::UnknownTenant(name.to_owned()));
        }
        self.tenants.push(Tenant { name: name.into(), max_blocks: None, max_chunks: None, slots: 0 });
        Ok(self.tenants.len() - 1)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Space> {
        self.spaces.iter()
    }

    pub(crate) fn class_of(&mut self, space: u32) -> &mut Class {
        let class = self.spaces[space as usize].class;
        &mut self.classes[class.0 as usize]
    }
}

impl std::ops::Index<u32> for Spaces {
    type Output = Space;

    fn index(&self, space: u32) -> &Space {
        &self.spaces[space as usize]
    }
}

impl std::ops::IndexMut<u32> for Spaces {
    fn index_mut(&mut self, space: u32) -> &mut Space {
        &mut self.spaces[space as usize]
    }
}
