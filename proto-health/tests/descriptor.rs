//! The descriptors that server reflection hands out.

#[path = "../../proto-common/tests/support/descriptor.rs"]
mod descriptor;

#[test]
fn holds_the_service_and_its_imports() {
    let set = descriptor::decode(proto_health::FILE_DESCRIPTOR_SET);
    let file = descriptor::file(&set, "node/health/v1/health.proto");
    assert_eq!(file.package(), "node.health.v1");
    assert_eq!(
        descriptor::methods(file),
        [
            "HealthService.HealthCheck(HealthCheckRequest) returns (HealthCheckResponse)",
            "HealthService.WatchHealth(WatchHealthRequest) returns (stream WatchHealthResponse)",
            "HealthService.GetNodeStatus(GetNodeStatusRequest) returns (GetNodeStatusResponse)",
        ]
    );
    // Health stands beside the other services, never on them.
    assert_eq!(file.dependency, ["node/common/v1/common.proto"]);
}
