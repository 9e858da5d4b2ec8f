{{- define "ladderstitch.image" -}}
{{- with .Values.image }}{{ .repository }}{{ with .digest }}@{{ . }}{{ else }}:{{ .tag }}{{ end }}{{ end }}
{{- end }}

{{- define "ladderstitch.name" -}}
{{ .Values.nameOverride | default .Chart.Name }}
{{- end }}

{{/*
Name of all objects. KubeRay adds up to 16 characters to a RayService's name and accepts 47. A longer
one is cut and ends in a digest of the whole, so that two long releases keep different names.
*/}}
{{- define "ladderstitch.fullname" -}}
{{- $name := include "ladderstitch.name" . }}
{{- $whole := .Values.fullnameOverride | default (contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) }}
{{- if gt (len $whole) 47 }}
{{- printf "%s-%s" ($whole | trunc 38 | trimAll "-.") ($whole | sha256sum | trunc 8) }}
{{- else }}
{{- $whole }}
{{- end }}
{{- end }}

{{/* Labels that selectors use: they identify the pods of this release and never change. */}}
{{- define "ladderstitch.selector" -}}
app.kubernetes.io/name: {{ include "ladderstitch.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ladderstitch.replicaSelector" -}}
{{ include "ladderstitch.selector" . }}
app.kubernetes.io/component: replica
{{- end }}

{{- define "ladderstitch.gatewaySelector" -}}
{{ include "ladderstitch.selector" . }}
app.kubernetes.io/component: gateway
{{- end }}

{{- define "ladderstitch.labels" -}}
{{- toYaml (merge (fromYaml (include "ladderstitch.selector" .)) .Values.commonLabels) }}
{{- end }}

{{/* Labels of the pods of a component. Arguments: root, values of the component, its name. */}}
{{- define "ladderstitch.podLabels" -}}
{{- $root := index . 0 }}
{{- $labels := merge (fromYaml (include "ladderstitch.selector" $root)) (dict "app.kubernetes.io/component" (index . 2)) }}
{{- toYaml (merge $labels (index . 1).podLabels $root.Values.commonLabels) }}
{{- end }}

{{/* Name of the service account of replicas and gateways; empty: the namespace's default. */}}
{{- define "ladderstitch.serviceAccount" -}}
{{- with .Values.serviceAccount }}
{{- .name | default (.create | ternary (include "ladderstitch.fullname" $) "") }}
{{- end }}
{{- end }}

{{/* Ports of a replica or gateway. Arguments: the values whose fields override the defaults. */}}
{{- define "ladderstitch.ports" -}}
{{- $defaults := dict "port" 8001 "admin_port" 8002 "health_port" 8003 "metrics_port" 9464 }}
{{- toYaml (merge (pick . "port" "admin_port" "health_port" "metrics_port" "http_port") $defaults) }}
{{- end }}

{{- define "ladderstitch.replicaPorts" -}}
{{- $ports := fromYaml (include "ladderstitch.ports" .Values.server) }}
{{- if .Values.http.enabled }}
{{- $ports = merge $ports (dict "http_port" 8081) }}
{{- end }}
{{- toYaml $ports }}
{{- end }}

{{- define "ladderstitch.gatewayPorts" -}}
{{- $ports := fromYaml (include "ladderstitch.ports" .Values.gateway.server) }}
{{- if .Values.http.enabled }}
{{- $ports = merge $ports (dict "http_port" 8081) }}
{{- end }}
{{- toYaml $ports }}
{{- end }}

{{/* Port of the Service for HTTP: that of the gateways, or of the replicas if there are none. */}}
{{- define "ladderstitch.httpPort" -}}
{{- $ports := .Values.gateway.enabled | ternary "ladderstitch.gatewayPorts" "ladderstitch.replicaPorts" }}
{{- (fromYaml (include $ports .)).http_port }}
{{- end }}

{{/* What replicas and gateways share: addresses, access. */}}
{{- define "ladderstitch.access" -}}
host: 0.0.0.0
admin_host: 127.0.0.1
tls_certificate: /etc/ladderstitch/tls/tls.crt
tls_key: /etc/ladderstitch/tls/tls.key
token_file: /etc/ladderstitch/tokens/tokens.yaml
drain_s: {{ .Values.drain.finishSeconds }}
{{- if .Values.tls.mutual }}
tls_client_ca: /etc/ladderstitch/tls/ca.crt
{{- end }}
{{- end }}

{{/* Fields of GatewayConfig: the same access as a replica, and TLS to the replicas. */}}
{{- define "ladderstitch.gatewayConfig" -}}
{{- $port := (fromYaml (include "ladderstitch.replicaPorts" .)).port }}
{{- $config := dict
  "replicas" (list (printf "dns:%s-replicas:%d" (include "ladderstitch.fullname" .) (int $port)))
  "replica_ca" "/etc/ladderstitch/tls/ca.crt" "replica_server_name" .Values.tls.serverName
  "replica_token_file" "/etc/ladderstitch/tokens/gateway-token"
  "drain_announce_s" .Values.drain.announceSeconds }}
{{- if .Values.tls.mutual }}
{{- $_ := set $config "replica_certificate" "/etc/ladderstitch/tls/tls.crt" }}
{{- $_ := set $config "replica_key" "/etc/ladderstitch/tls/tls.key" }}
{{- end }}
{{- $access := fromYaml (include "ladderstitch.access" .) }}
{{- $ports := fromYaml (include "ladderstitch.gatewayPorts" .) }}
{{- toYaml (merge $config $access $ports .Values.gateway.server (pick .Values.server "cors_origins")) }}
{{- end }}

{{/* Fields of ServerConfig. The schema refuses the fields in `server` that are set here. */}}
{{- define "ladderstitch.config" -}}
{{- $config := dict "tensor_parallel_size" .Values.tensorParallelSize "spare_ranks" .Values.spareRanks }}
{{- with .Values.model.bundle }}{{ $_ := set $config "bundle" . }}{{ end }}
{{- $access := fromYaml (include "ladderstitch.access" .) }}
{{- $ports := fromYaml (include "ladderstitch.replicaPorts" .) }}
{{- toYaml (merge $config $access $ports .Values.server) }}
{{- end }}

{{/* Part of a pod's spec. Arguments: root, values of the component, its name. */}}
{{- define "ladderstitch.podSpec" -}}
{{- $root := index . 0 }}
{{- $values := index . 1 }}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml $root.Values.podSecurityContext | nindent 2 }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- range $field := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $values $field }}
{{ $field }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with $values.topologySpreadConstraints }}
{{- $labels := merge (fromYaml (include "ladderstitch.selector" $root)) (dict "app.kubernetes.io/component" (index $ 2)) }}
topologySpreadConstraints: # over the pods of this component unless they say otherwise
  {{- range . }}
  - {{- toYaml (merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" $labels))) | nindent 4 }}
  {{- end }}
{{- end }}
{{- end }}

{{/* The container needs no root user, no capability and no writable root file system. */}}
{{- define "ladderstitch.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Part of a Service's spec. Arguments: its values. */}}
{{- define "ladderstitch.serviceType" -}}
type: {{ .type }}
{{- with .loadBalancerSourceRanges }}
loadBalancerSourceRanges:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Variables of a container. Arguments: the component's values, YAML of its own variables. */}}
{{- define "ladderstitch.env" -}}
{{- $own := (index . 1) | fromYamlArray }}
{{- with concat $own (index . 0).extraEnv }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with (index . 0).extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Variables of a replica's container, as a list. */}}
{{- define "ladderstitch.replicaEnv" -}}
# one event loop for Serve's gRPC server and ours: with two, each event wakes both
- {name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0"}
- {name: RAY_USE_UVLOOP, value: "0"} # slower with gRPC's wake-ups
# options of `ladderstitch drain`
- {name: LADDERSTITCH_CA, value: /etc/ladderstitch/tls/ca.crt}
- {name: LADDERSTITCH_SERVER_NAME, value: {{ .Values.tls.serverName | quote }}}
- {name: LADDERSTITCH_TOKEN_FILE, value: /etc/ladderstitch/tokens/drain-token}
{{- if .Values.tls.mutual }}
- {name: LADDERSTITCH_CERTIFICATE, value: /etc/ladderstitch/tls/tls.crt}
- {name: LADDERSTITCH_KEY, value: /etc/ladderstitch/tls/tls.key}
{{- end }}
{{- end }}
