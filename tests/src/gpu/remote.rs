//! A cache server in another process: CUDA IPC is between processes only.

use cairn_client::{CacheClient, ClientOptions};
use cairn_server::{Config, Server};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The process with the server: serves a configuration, on free ports, until its input ends. Then its books are checked.
///
/// # Panics
/// When the server does not start, or its books are not in order.
pub fn serve(config: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut config = Config::from_file(config).expect("a configuration");
        config.server.listen = ([127, 0, 0, 1], 0).into();
        config.server.http_listen = ([127, 0, 0, 1], 0).into();
        config.server.shutdown_grace_ms = 2000;
        let server = Server::start(config).await.expect("a server");
        println!("{}", server.address());
        std::io::stdout().flush().expect("written");
        let input = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()));
        input.await.expect("no panic").expect("the end of the input");
        server.audit().expect("the server's books are in order");
        server.shutdown().await.expect("an orderly end");
    });
}

/// A server in another process.
pub(super) struct Remote {
    child: Child,
    url: String,
    _config: tempfile::NamedTempFile,
}

impl Remote {
    /// `arguments`: of this program, before the name of the configuration's file.
    ///
    /// # Panics
    /// When it does not start.
    pub(super) fn start(arguments: &[&str], config: &str, settings: &[(&str, &str)]) -> Self {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(config.as_bytes()).expect("written");
        let program = std::env::current_exe().expect("this program");
        let mut command = Command::new(program);
        command.args(arguments).arg(file.path()).envs(settings.iter().copied());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the other process starts");
        let mut output = BufReader::new(child.stdout.take().expect("its output"));
        let mut line = String::new();
        output.read_line(&mut line).expect("its first line");
        assert!(!line.is_empty(), "the server did not start");
        // What else it says is for whoever watches.
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                println!("server: {line}");
            }
        });
        Self { child, url: format!("http://{}", line.trim()), _config: file }
    }

    pub(super) fn client(&self) -> CacheClient {
        CacheClient::start(self.options()).expect("a client")
    }

    /// That waits: an emulated device leaves little of the machine to others.
    pub(super) fn options(&self) -> ClientOptions {
        super::tokens::patient(&self.url)
    }

    /// # Panics
    /// When it ends badly.
    pub(super) fn end(mut self) {
        drop(self.child.stdin.take());
        let status = self.child.wait().expect("it ends");
        assert!(status.success(), "the server's process: {status}");
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // After `end` it is gone; after a failed check it must go.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
