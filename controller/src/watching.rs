//! Watches of whole kinds: as a stream, or into memory, pruned, with a word for each object that came, changed or went.

use std::{fmt::Debug, pin::pin, sync::Arc};

use futures::{Stream, StreamExt, future};
use kube::{
    Api, Client, Error, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        reflector::{self, ObjectRef, Store, store::Writer},
        watcher::{self, Event},
    },
};
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;

use crate::{backoff::Backoff, watched::LAST_APPLIED};

/// Asks for a list that is streamed as kube's watcher does not: with all that was written before the question (meta/v1
/// ListOptions: sendInitialEvents with resourceVersion unset). With "0" a server may answer from a cache that lags, and an agent that
/// its blade runs already would not be in the list.
pub(crate) fn consistently<B>(mut request: http::Request<B>) -> http::Request<B> {
    let query = request.uri().query().unwrap_or_default();
    if query.split('&').any(|pair| pair == "sendInitialEvents=true") {
        let pairs: Vec<&str> = query.split('&').filter(|pair| *pair != "resourceVersion=0").collect();
        let target = [request.uri().path(), "?", &pairs.join("&")].concat();
        let mut parts = request.uri().clone().into_parts();
        parts.path_and_query = target.parse().ok();
        if let Ok(uri) = http::Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}

/// HTTP codes of an API server that does not know or does not want a parameter.
const UNWANTED: [u16; 2] = [400, 422];

/// Tells of every object of a kind, and then of what becomes of them.
///
/// The list comes as a stream, which the server writes while it is read; the client has to ask [`consistently`]. A server that does
/// not offer that (feature WatchList, off by default in Kubernetes 1.33) is asked for pages.
pub(crate) fn watch<K>(api: Api<K>) -> impl Stream<Item = Result<Event<K>, watcher::Error>> + Send
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let is_offered = |event: &Result<Event<K>, watcher::Error>| {
        future::ready(
            !matches!(event, Err(watcher::Error::WatchStartFailed(Error::Api(status))) if UNWANTED.contains(&status.code)),
        )
    };
    let pages = watcher::watcher(api.clone(), watcher::Config::default());
    watcher::watcher(api, watcher::Config::default().streaming_lists())
        .take_while(is_offered)
        .chain(pages)
}

/// Keeps every object of a kind in the answered store; the task runs until it is aborted.
pub(crate) fn keep<K>(client: Client, changed: impl Fn(&K) + Send + 'static) -> (Store<K>, JoinHandle<()>)
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let (reader, writer) = reflector::store();
    let watch = watch(Api::<K>::all(client))
        .backoff(Backoff::default())
        .modify(|object| {
            // Neither is read here, and together they are most of an object's memory.
            object.meta_mut().managed_fields = None;
            object.annotations_mut().remove(LAST_APPLIED);
        });
    (reader.clone(), tokio::spawn(follow(watch, reader, writer, changed)))
}

async fn follow<K>(
    watch: impl Stream<Item = Result<Event<K>, watcher::Error>>,
    store: Store<K>,
    writer: Writer<K>,
    changed: impl Fn(&K),
) where
    K: Resource<DynamicType = ()> + Clone,
{
    let mut events = pin!(watch.reflect(writer));
    // Known before a list began: the watch says nothing of what went while it did not run.
    let mut before: Vec<Arc<K>> = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::InitApply(object) | Event::Apply(object) | Event::Delete(object)) => changed(&object),
            Ok(Event::Init) => before = store.state(),
            Ok(Event::InitDone) => {
                let known = std::mem::take(&mut before).into_iter();
                known
                    .filter(|object| store.get(&ObjectRef::from_obj(&**object)).is_none())
                    .for_each(|object| changed(&object));
            }
            Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "a watch failed: trying again"),
        }
    }
}

/// (namespace, name).
pub(crate) fn key<K: ResourceExt>(object: &K) -> (String, String) {
    (object.namespace().unwrap_or_default(), object.name_any())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use k8s_openapi::api::core::v1::ConfigMap;
    use tokio::{
        io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
        net::TcpListener,
    };

    use super::*;

    /// An API server without the feature WatchList; answers the queries that came.
    async fn old_server(listener: TcpListener, queries: Arc<Mutex<Vec<String>>>) {
        let refusal = r#"{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","code":422,"message":"sendInitialEvents is forbidden"}"#;
        let list = r#"{"kind":"ConfigMapList","apiVersion":"v1","metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"one"}}]}"#;
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let (mut first, mut line) = (String::new(), String::new());
            stream.read_line(&mut first).await.unwrap();
            while stream.read_line(&mut line).await.unwrap() > 2 {
                line.clear();
            }
            let (status, body) = match first.contains("sendInitialEvents=true") {
                true => ("422 Unprocessable Entity", refusal),
                false => ("200 OK", list),
            };
            queries.lock().unwrap().push(first);
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    }

    #[test]
    fn a_streamed_list_is_as_new_as_the_question_and_nothing_else_is_asked_otherwise() {
        let asked = |uri: &str| {
            consistently(http::Request::get(uri).body(()).unwrap())
                .uri()
                .to_string()
        };
        for (uri, expected) in [
            (
                "/apis/g/v1/k?watch=true&resourceVersion=0&sendInitialEvents=true&resourceVersionMatch=NotOlderThan",
                "/apis/g/v1/k?watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan",
            ),
            (
                "https://h:6443/k?sendInitialEvents=true&resourceVersion=0",
                "https://h:6443/k?sendInitialEvents=true",
            ),
            ("/k?watch=true&resourceVersion=0", "/k?watch=true&resourceVersion=0"),
            (
                "/k?sendInitialEvents=true&resourceVersion=07",
                "/k?sendInitialEvents=true&resourceVersion=07",
            ),
            ("/k", "/k"),
        ] {
            assert_eq!(asked(uri), expected);
        }
    }

    #[tokio::test]
    async fn a_server_that_streams_no_lists_is_asked_for_pages() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = kube::Config::new(format!("http://{}", listener.local_addr().unwrap()).parse().unwrap());
        let queries = Arc::default();
        let server = tokio::spawn(old_server(listener, Arc::clone(&queries)));
        let api = Api::<ConfigMap>::all(Client::try_from(config).unwrap());
        let mut watch = pin!(watch(api));
        let mut told = Vec::new();
        loop {
            match watch.next().await.unwrap().unwrap() {
                Event::Init => {}
                Event::InitApply(object) => told.push(object.name_any()),
                Event::InitDone => break,
                other => panic!("{other:?}"),
            }
        }
        server.abort();
        assert_eq!(told, ["one"]);
        let queries = queries.lock().unwrap();
        assert!(queries.len() == 2 && queries[1].contains("limit=500"), "{queries:?}");
    }

    #[tokio::test]
    async fn a_word_is_said_for_what_a_later_list_does_not_have_any_more() {
        let object = |name: &str| {
            let mut object = ConfigMap::default();
            object.metadata.name = Some(name.to_owned());
            object
        };
        let events = [
            Event::Init,
            Event::InitApply(object("gone")),
            Event::InitApply(object("there")),
            Event::InitDone,
            Event::Init,
            Event::InitApply(object("there")),
            Event::InitDone,
        ];
        let (reader, writer) = reflector::store();
        let said = Mutex::new(Vec::new());
        let say = |one: &ConfigMap| said.lock().unwrap().push(one.name_any());
        follow(futures::stream::iter(events.map(Ok)), reader, writer, say).await;
        assert_eq!(*said.lock().unwrap(), ["gone", "there", "there", "gone"]);
    }
}
