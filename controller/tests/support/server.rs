//! The Kubernetes API that a test runs on: far-devapi in this process, or with `FAR_TEST_API=real` a kube-apiserver of its
//! own. What speaks of far-devapi alone (its faults) is in modules named `embedded`, which the real half leaves out.

use std::{ops::Deref, path::Path};

use far_devapi::DevApi;
use far_testkit::servers::{self, ControlPlane, Part};

pub enum Server {
    Embedded(DevApi),
    Real(ControlPlane),
}

impl Server {
    /// With its data in `dir`. Of a real one the parts that are named run too; far-devapi has no parts.
    pub async fn start(dir: &Path, with: &'static [Part]) -> Self {
        if servers::are_asked_for() {
            return Self::real(dir, with).await;
        }
        let config = far_devapi::Config::new(dir.join("devapi"));
        Self::Embedded(DevApi::start(config).await.unwrap())
    }

    /// A kube-apiserver in any case.
    pub async fn real(dir: &Path, with: &'static [Part]) -> Self {
        let folder = dir.join("servers");
        let start = move || ControlPlane::start(&folder, with);
        let plane = tokio::task::spawn_blocking(start).await.unwrap();
        Self::Real(plane.unwrap())
    }

    pub fn kubeconfig(&self) -> String {
        match self {
            Self::Embedded(api) => api.kubeconfig.clone(),
            Self::Real(plane) => std::fs::read_to_string(&plane.kubeconfig).unwrap(),
        }
    }
}

impl Deref for Server {
    type Target = DevApi;

    fn deref(&self) -> &DevApi {
        match self {
            Self::Embedded(api) => api,
            Self::Real(_) => panic!("only far-devapi can do that: such a test belongs into a module named `embedded`"),
        }
    }
}
