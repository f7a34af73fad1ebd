//! The blade API (`far.controller.v1.Blades`): join with a token, then everything as the certificate's blade.
//!
//! The client certificate is optional in TLS, because Join has none; every other method asks for it here.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use far_core::identity::is_blade_name;
use far_proto::controller::{
    HeartbeatRequest, HeartbeatResponse, JoinRequest, JoinResponse, RenewRequest, RenewResponse, blades_server::Blades,
};
use time::OffsetDateTime;
use tonic::{Request, Response, Status, async_trait};

use crate::{
    ca::{self, Ca, CaError, Issued},
    door::Visit,
    leader::Lead,
    metrics::Metrics,
    registry::{HeartbeatError, Registry},
    tokens::{Revocations, TokenError, Tokens},
    world::World,
};

/// Valid certificates of a blade beyond which none is renewed; blades renew at half of their life.
const MAX_VALID: usize = 32;

pub(crate) struct BladeApi {
    pub(crate) ca: Arc<Ca>,
    pub(crate) tokens: Tokens,
    pub(crate) signing: Mutex<()>,
    pub(crate) revocations: Revocations,
    pub(crate) registry: Arc<Registry>,
    pub(crate) metrics: Metrics,
    pub(crate) certificate_life: Duration,
    pub(crate) heartbeat_ms: u32,
    pub(crate) lead: Lead,
    pub(crate) world: Arc<World>,
    /// See `Config::fence_after`.
    pub(crate) fence_after: Duration,
}

impl BladeApi {
    /// The blade that calls, by its verified certificate.
    fn caller<T>(&self, request: &Request<T>) -> Result<String, Status> {
        let visit = request.extensions().get::<Visit>();
        let leaf = visit
            .and_then(Visit::certificate)
            .ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        let (blade, serial) = ca::blade_of(leaf)
            .ok_or_else(|| Status::permission_denied("the client certificate is not a blade's, or it ended"))?;
        if self.revocations.is_revoked(&serial) || self.revocations.is_blade_revoked(&blade) {
            return Err(Status::permission_denied(format!(
                "the certificate of blade {blade} was revoked"
            )));
        }
        if visit.is_some_and(|visit| !visit.is_recognised(&blade)) {
            return Err(Status::resource_exhausted(
                "too many blades are connected, or this one too often",
            ));
        }
        Ok(blade)
    }

    /// One at a time: what is noted is read and written as a whole.
    fn sign(&self, blade: &str, csr_pem: &str, most: usize) -> Result<Issued, Status> {
        let _one = self.signing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.revocations.valid(blade).len() >= most {
            return Err(Status::resource_exhausted(format!(
                "blade {blade} has {most} valid certificates already"
            )));
        }
        let issued = self
            .ca
            .sign_blade(blade, csr_pem, self.certificate_life)
            .map_err(|error| request_status(blade, error))?;
        let ends = u64::try_from(issued.not_after.unix_timestamp()).unwrap_or(u64::MAX);
        self.revocations.note(blade, &issued.serial, ends).map_err(|error| {
            tracing::error!(blade, %error, "a certificate's serial was not kept");
            Status::internal("the certificate was not kept")
        })?;
        tracing::info!(blade, serial = issued.serial, "a blade has a new certificate");
        Ok(issued)
    }
}

#[async_trait]
impl Blades for BladeApi {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let joined = self.admit(request);
        self.metrics.joined(joined.is_ok());
        joined
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let blade = self.caller(&request)?;
        let issued = self.sign(&blade, &request.into_inner().csr_pem, MAX_VALID)?;
        // Noted by now. Revoked meanwhile, it may have been noted too late.
        if self.revocations.is_blade_revoked(&blade) {
            let _ = self.revocations.revoke(&blade);
            return Err(Status::permission_denied(format!("blade {blade} was revoked")));
        }
        Ok(Response::new(RenewResponse {
            certificate_pem: issued.certificate_pem,
            ca_pem: self.ca.certificate_pem().to_owned(),
            not_after: Some(timestamp(issued.not_after)),
        }))
    }

    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatResponse>, Status> {
        let heard = self.hear(request).await;
        self.metrics.heartbeat(heard.is_ok());
        heard
    }
}

impl BladeApi {
    fn admit(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let JoinRequest { token, blade, csr_pem } = request.into_inner();
        if !is_blade_name(&blade) {
            return Err(Status::invalid_argument("blade must be a DNS label of 1 to 63 bytes"));
        }
        // The token first: nobody without one learns how requests are judged.
        // A name that is taken is worth more than an open token: whoever has one must not become a blade that is there.
        let must_be_bound = self.revocations.knows(&blade);
        let refused = |error| token_status(&blade, error);
        self.tokens.check(&token, &blade, must_be_bound).map_err(refused)?;
        // Used up only by a request that will be signed.
        ca::check_request(&blade, &csr_pem).map_err(|error| request_status(&blade, error))?;
        self.tokens.take(&token, &blade, must_be_bound).map_err(refused)?;
        // Not bounded: each took a token, and a blade that joins again may hold many that it lost.
        let issued = self.sign(&blade, &csr_pem, usize::MAX)?;
        self.revocations.welcome(&blade).map_err(|error| {
            tracing::error!(blade, %error, "the mark of a revoked blade was not removed");
            Status::internal("the blade is still marked as revoked")
        })?;
        Ok(Response::new(JoinResponse {
            certificate_pem: issued.certificate_pem,
            ca_pem: self.ca.certificate_pem().to_owned(),
            not_after: Some(timestamp(issued.not_after)),
        }))
    }

    async fn hear(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatResponse>, Status> {
        let blade = self.caller(&request)?;
        self.registry
            .heartbeat(&blade, request.into_inner())
            .await
            .map_err(|error| match error {
                HeartbeatError::Invalid(text) => Status::invalid_argument(text),
                HeartbeatError::TooOften { .. } => Status::resource_exhausted(error.to_string()),
                HeartbeatError::Write { source, .. } => {
                    tracing::warn!(blade, error = %source, "a heartbeat could not be written down");
                    Status::unavailable("the Kubernetes API does not take it now")
                }
            })?;
        // Its successor must not count on a fence that this one still puts off.
        if !self.lead.is_fresh() {
            return Err(Status::unavailable("this controller may lead no more"));
        }
        Ok(Response::new(HeartbeatResponse {
            interval_ms: self.heartbeat_ms,
            epoch: self.lead.epoch,
            fence_after_ms: u64::try_from(self.fence_after.as_millis()).unwrap_or(u64::MAX),
            unreached: !self.world.puts_fence_off(&blade),
        }))
    }
}

fn request_status(blade: &str, error: CaError) -> Status {
    match error {
        CaError::Request(text) => Status::permission_denied(text),
        CaError::File { .. } | CaError::Make { .. } => {
            tracing::error!(blade, %error, "a certificate was not made");
            Status::internal("the certificate was not made")
        }
    }
}

fn token_status(blade: &str, error: TokenError) -> Status {
    match error {
        TokenError::Refused | TokenError::OtherBlade | TokenError::NotBound(_) => {
            Status::unauthenticated(error.to_string())
        }
        TokenError::File { .. } | TokenError::TooMany => {
            tracing::error!(blade, %error, "a join token could not be checked");
            Status::unavailable("the token cannot be checked now")
        }
    }
}

fn timestamp(at: OffsetDateTime) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: at.unix_timestamp(),
        nanos: 0,
    }
}
