//! The blade API (`far.controller.v1.Blades`): join with a token, then everything as the certificate's blade.
//!
//! The client certificate is optional in TLS, because Join has none; every other method asks for it here.

use std::{sync::Arc, time::Duration};

use far_core::identity::is_blade_name;
use far_proto::controller::{
    HeartbeatRequest, HeartbeatResponse, JoinRequest, JoinResponse, RenewRequest, RenewResponse, blades_server::Blades,
};
use time::OffsetDateTime;
use tonic::{Request, Response, Status, async_trait};

use crate::{
    ca::{self, Ca, CaError, Issued},
    leader::Lead,
    registry::{HeartbeatError, Registry},
    tokens::{Revocations, TokenError, Tokens},
    world::World,
};

pub(crate) struct BladeApi {
    pub(crate) ca: Arc<Ca>,
    pub(crate) tokens: Tokens,
    pub(crate) revocations: Revocations,
    pub(crate) registry: Arc<Registry>,
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
        let certificates = request
            .peer_certs()
            .ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        let leaf = certificates
            .first()
            .ok_or_else(|| Status::unauthenticated("a client certificate is needed"))?;
        let (blade, serial) =
            ca::blade_of(leaf).ok_or_else(|| Status::permission_denied("the client certificate is not a blade's"))?;
        if self.revocations.is_revoked(&serial) {
            return Err(Status::permission_denied(format!(
                "the certificate of blade {blade} was revoked"
            )));
        }
        Ok(blade)
    }

    fn sign(&self, blade: &str, csr_pem: &str) -> Result<Issued, Status> {
        let issued = self
            .ca
            .sign_blade(blade, csr_pem, self.certificate_life)
            .map_err(|error| request_status(blade, error))?;
        self.revocations.note(blade, &issued.serial).map_err(|error| {
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
        let issued = self.sign(&blade, &csr_pem)?;
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

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let blade = self.caller(&request)?;
        let issued = self.sign(&blade, &request.into_inner().csr_pem)?;
        Ok(Response::new(RenewResponse {
            certificate_pem: issued.certificate_pem,
            ca_pem: self.ca.certificate_pem().to_owned(),
            not_after: Some(timestamp(issued.not_after)),
        }))
    }

    async fn heartbeat(&self, request: Request<HeartbeatRequest>) -> Result<Response<HeartbeatResponse>, Status> {
        let blade = self.caller(&request)?;
        self.registry
            .heartbeat(&blade, request.into_inner())
            .await
            .map_err(|error| match error {
                HeartbeatError::Invalid(text) => Status::invalid_argument(text),
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
