//! Images and the attempts that need them.

use super::*;

#[tokio::test]
async fn an_image_that_an_attempt_may_be_prepared_from_loses_its_name_only() {
    use far_proto::node::node_server::Node as _;
    let world = World::new();
    let node = world.start().await;
    let api = api(&world, &node);
    let remove = || {
        let reference = "a".to_owned();
        api.remove_image(tonic::Request::new(proto::RemoveImageRequest { reference }))
    };
    let collections = || world.images.collections.load(std::sync::atomic::Ordering::SeqCst);
    // Without its secrets it waits, and has no image in its record yet.
    let waiting = spec().without_secrets().into();
    node.supervisor.ensure(identity(1), waiting).await.unwrap();
    remove().await.unwrap();
    assert_eq!(collections(), 0);
    node.supervisor.stop(identity(1), None, None).await.unwrap();
    node.until_ended().await;
    remove().await.unwrap();
    assert_eq!(collections(), 1);
}
