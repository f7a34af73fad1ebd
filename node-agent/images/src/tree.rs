//! The merged tree of an image: names, kinds and permissions in memory, contents by their place in the spool.
//!
//! Rules of layers (OCI image spec, layer.md): a later entry replaces an earlier one; `.wh.<name>` removes a name that
//! lower layers brought; `.wh..wh..opq` hides everything lower layers put into its folder; a folder over a folder keeps
//! its children. Names are resolved here and nowhere else: a symlink is never followed.

use std::collections::BTreeMap;

/// Where a file's content lies in the spool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File(Content),
    Symlink(Vec<u8>),
    Folder(BTreeMap<Vec<u8>, Node>),
}

/// Owner and permission bits (set-user-id and the like included).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// One name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) kind: Kind,
    /// The layer that brought it, for whiteouts, which touch lower layers only.
    layer: usize,
    /// The last layer that hid everything of lower layers inside: hiding once more finds nothing, and must not search.
    cleared: usize,
}

impl Node {
    /// New in `layer`: nothing of a lower layer is inside.
    fn new(meta: Meta, kind: Kind, layer: usize) -> Self {
        Self {
            meta,
            kind,
            layer,
            cleared: layer,
        }
    }
}

/// A folder that no layer described: what a tar may leave out.
const IMPLIED: Meta = Meta {
    mode: 0o755,
    uid: 0,
    gid: 0,
};

/// Folders that were made because something lies below them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Implied {
    pub(crate) folders: usize,
    /// Bytes of their paths together.
    pub(crate) path_bytes: u64,
}

/// An image's files.
#[derive(Debug)]
pub(crate) struct Tree {
    root: Node,
    layer: usize,
    implied: Implied,
}

impl Tree {
    pub(crate) fn new() -> Self {
        Self {
            root: Node::new(IMPLIED, Kind::Folder(BTreeMap::new()), 0),
            layer: 0,
            implied: Implied::default(),
        }
    }

    /// Entries added from now on belong to the next layer.
    pub(crate) fn next_layer(&mut self) {
        self.layer += 1;
    }

    /// What was implied since the last call: one entry of a layer may imply as many folders as its path has parts.
    pub(crate) fn take_implied(&mut self) -> Implied {
        std::mem::take(&mut self.implied)
    }

    /// Puts an entry at `path` (its parts, without "." and ".."). An empty path is the root folder itself.
    ///
    /// # Errors
    /// A sentence, when a part of the path is something that has no children, or the root would stop being a folder.
    pub(crate) fn put(&mut self, path: &[Vec<u8>], meta: Meta, kind: Kind) -> Result<(), &'static str> {
        let layer = self.layer;
        let Some((name, parents)) = path.split_last() else {
            return match kind {
                Kind::Folder(_) => {
                    self.root.meta = meta;
                    Ok(())
                }
                Kind::File(_) | Kind::Symlink(_) => Err("would replace the root folder"),
            };
        };
        let folder = self.folder(parents)?;
        match (folder.get_mut(name), kind) {
            (
                Some(Node {
                    meta: old,
                    kind: Kind::Folder(_),
                    layer: of,
                    ..
                }),
                Kind::Folder(_),
            ) => {
                *old = meta;
                *of = layer;
            }
            (_, kind) => {
                folder.insert(name.clone(), Node::new(meta, kind, layer));
            }
        }
        Ok(())
    }

    /// The folder at `path`, made where it is missing. A lower layer's file in its place is replaced, as every layer may
    /// replace; a symlink is not followed and not replaced.
    fn folder(&mut self, path: &[Vec<u8>]) -> Result<&mut BTreeMap<Vec<u8>, Node>, &'static str> {
        let layer = self.layer;
        let implied = &mut self.implied;
        let mut node = &mut self.root;
        let mut path_bytes = 0;
        for part in path {
            let Kind::Folder(children) = &mut node.kind else {
                return Err("lies below something that is not a folder");
            };
            path_bytes += part.len() as u64 + 1;
            node = children.entry(part.clone()).or_insert_with(|| {
                implied.folders += 1;
                implied.path_bytes += path_bytes;
                Node::new(IMPLIED, Kind::Folder(BTreeMap::new()), layer)
            });
            match node.kind {
                Kind::Folder(_) => {}
                Kind::Symlink(_) => return Err("lies below a symbolic link"),
                Kind::File(_) => return Err("lies below a file"),
            }
        }
        match &mut node.kind {
            Kind::Folder(children) => Ok(children),
            Kind::File(_) | Kind::Symlink(_) => Err("lies below something that is not a folder"),
        }
    }

    /// Removes what lower layers have at `path`. Nothing there is no error: the layer may have been squashed.
    pub(crate) fn whiteout(&mut self, path: &[Vec<u8>]) {
        let layer = self.layer;
        let Some((name, parents)) = path.split_last() else {
            return;
        };
        let Some(Node {
            kind: Kind::Folder(children),
            ..
        }) = self.existing(parents)
        else {
            return;
        };
        if children.get_mut(name).is_some_and(|node| !keep_layer(node, layer)) {
            children.remove(name);
        }
    }

    /// Hides everything lower layers put into the folder at `path`.
    pub(crate) fn opaque(&mut self, path: &[Vec<u8>]) {
        let layer = self.layer;
        if let Some(node) = self.existing(path) {
            clear(node, layer);
        }
    }

    fn existing(&mut self, path: &[Vec<u8>]) -> Option<&mut Node> {
        path.iter().try_fold(&mut self.root, |node, part| match &mut node.kind {
            Kind::Folder(children) => children.get_mut(part),
            Kind::File(_) | Kind::Symlink(_) => None,
        })
    }

    /// What is at `path`, without following symlinks.
    pub(crate) fn get(&self, path: &[Vec<u8>]) -> Option<&Node> {
        path.iter().try_fold(&self.root, |node, part| match &node.kind {
            Kind::Folder(children) => children.get(part),
            Kind::File(_) | Kind::Symlink(_) => None,
        })
    }

    pub(crate) fn root(&self) -> &Node {
        &self.root
    }
}

/// Removes from `node` what lower layers brought; false when nothing is left of it. A lower layer's folder stays while
/// this layer has something in it: the result must not depend on where in the layer the whiteout stands.
fn keep_layer(node: &mut Node, layer: usize) -> bool {
    clear(node, layer);
    let has_something = matches!(&node.kind, Kind::Folder(children) if !children.is_empty());
    node.layer >= layer || has_something
}

/// Removes what lower layers brought into a folder, once for each layer.
fn clear(node: &mut Node, layer: usize) {
    if node.cleared < layer
        && let Kind::Folder(children) = &mut node.kind
    {
        children.retain(|_, child| keep_layer(child, layer));
        node.cleared = layer;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: Meta = Meta {
        mode: 0o644,
        uid: 0,
        gid: 0,
    };

    fn path(text: &str) -> Vec<Vec<u8>> {
        text.split('/')
            .filter(|part| !part.is_empty())
            .map(|part| part.as_bytes().to_vec())
            .collect()
    }
    fn file(n: u64) -> Kind {
        Kind::File(Content { offset: n, len: 1 })
    }
    fn folder() -> Kind {
        Kind::Folder(BTreeMap::new())
    }
    fn names(tree: &Tree) -> Vec<String> {
        fn walk(node: &Node, at: &str, out: &mut Vec<String>) {
            if let Kind::Folder(children) = &node.kind {
                for (name, child) in children {
                    let here = format!("{at}/{}", String::from_utf8_lossy(name));
                    out.push(here.clone());
                    walk(child, &here, out);
                }
            }
        }
        let mut out = Vec::new();
        walk(tree.root(), "", &mut out);
        out
    }

    #[test]
    fn a_whiteout_removes_only_what_lower_layers_brought() {
        let mut tree = Tree::new();
        tree.put(&path("/a/old"), META, file(1)).unwrap();
        tree.put(&path("/a/gone"), META, file(2)).unwrap();
        tree.next_layer();
        tree.put(&path("/a/new"), META, file(3)).unwrap();
        tree.whiteout(&path("/a/gone"));
        tree.whiteout(&path("/a/new"));
        assert_eq!(names(&tree), ["/a", "/a/new", "/a/old"]);
    }

    #[test]
    fn an_opaque_folder_hides_lower_layers_at_every_depth_in_any_order() {
        for opaque_first in [true, false] {
            let mut tree = Tree::new();
            tree.put(&path("/d/low/x"), META, file(1)).unwrap();
            tree.next_layer();
            if opaque_first {
                tree.opaque(&path("/d"));
            }
            tree.put(&path("/d"), META, folder()).unwrap();
            tree.put(&path("/d/high"), META, file(2)).unwrap();
            if !opaque_first {
                tree.opaque(&path("/d"));
            }
            assert_eq!(names(&tree), ["/d", "/d/high"], "{opaque_first}");
        }
    }

    #[test]
    fn a_whiteout_leaves_what_its_own_layer_put_into_a_lower_folder() {
        let mut tree = Tree::new();
        tree.put(&path("/d/sub/old"), META, file(1)).unwrap();
        tree.next_layer();
        tree.put(&path("/d/sub/new"), META, file(2)).unwrap();
        tree.whiteout(&path("/d/sub"));
        tree.opaque(&path("/d"));
        assert_eq!(names(&tree), ["/d", "/d/sub", "/d/sub/new"]);
    }

    #[test]
    fn nothing_is_written_through_a_symbolic_link() {
        let mut tree = Tree::new();
        tree.put(&path("/lib"), META, Kind::Symlink(b"/etc".to_vec())).unwrap();
        tree.next_layer();
        assert_eq!(
            tree.put(&path("/lib/passwd"), META, file(1)),
            Err("lies below a symbolic link")
        );
        assert_eq!(names(&tree), ["/lib"]);
    }

    #[test]
    fn a_layer_may_replace_a_symbolic_link_by_a_file_and_a_folder_by_a_file() {
        let mut tree = Tree::new();
        tree.put(&path("/x"), META, Kind::Symlink(b"/etc/shadow".to_vec()))
            .unwrap();
        tree.put(&path("/y/z"), META, file(1)).unwrap();
        tree.next_layer();
        tree.put(&path("/x"), META, file(2)).unwrap();
        tree.put(&path("/y"), META, file(3)).unwrap();
        assert_eq!(names(&tree), ["/x", "/y"]);
        assert!(matches!(tree.get(&path("/x")).unwrap().kind, Kind::File(_)));
    }

    #[test]
    fn a_folder_described_late_keeps_its_children() {
        let mut tree = Tree::new();
        tree.put(&path("/a/b"), META, file(1)).unwrap();
        tree.put(
            &path("/a"),
            Meta {
                mode: 0o700,
                uid: 5,
                gid: 6,
            },
            folder(),
        )
        .unwrap();
        assert_eq!(names(&tree), ["/a", "/a/b"]);
        assert_eq!(tree.get(&path("/a")).unwrap().meta.uid, 5);
    }

    #[test]
    fn hiding_a_folder_a_second_time_in_a_layer_does_not_search_it() {
        let mut tree = Tree::new();
        tree.put(&path("/d/sub/old"), META, file(1)).unwrap();
        tree.next_layer();
        tree.opaque(&path("/d"));
        // What no layer can do, to see whether it is looked for: something of a lower layer comes back.
        tree.layer = 0;
        tree.put(&path("/d/stale"), META, file(2)).unwrap();
        tree.layer = 1;
        tree.opaque(&path("/d"));
        tree.put(&path("/d/new"), META, file(3)).unwrap();
        tree.whiteout(&path("/d"));
        assert_eq!(names(&tree), ["/d", "/d/new", "/d/stale"]);
        tree.next_layer();
        tree.opaque(&path("/d"));
        assert_eq!(names(&tree), ["/d"], "the next layer hides anew");
    }

    #[test]
    fn folders_that_a_path_implies_are_counted_once_with_their_paths() {
        let mut tree = Tree::new();
        tree.put(&path("/a/bc/f"), META, file(1)).unwrap();
        tree.put(&path("/a/bc/g"), META, file(2)).unwrap();
        let wanted = Implied {
            folders: 2,
            path_bytes: 2 + 5,
        };
        assert_eq!(tree.take_implied(), wanted);
        assert_eq!(tree.take_implied(), Implied::default());
    }

    #[test]
    fn the_root_stays_a_folder() {
        let mut tree = Tree::new();
        assert!(tree.put(&[], META, file(1)).is_err());
        assert!(tree.put(&[], META, folder()).is_ok());
    }
}
