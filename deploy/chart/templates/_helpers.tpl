{{- define "ladderstitch.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end }}

{{- define "ladderstitch.labels" -}}
app.kubernetes.io/name: ladderstitch
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ladderstitch.replicaLabels" -}}
{{ include "ladderstitch.labels" . }}
app.kubernetes.io/component: replica
{{- end }}

{{- define "ladderstitch.gatewayLabels" -}}
{{ include "ladderstitch.labels" . }}
app.kubernetes.io/component: gateway
{{- end }}

{{/* Fields of GatewayConfig: the same access as a replica, and TLS to the replicas. */}}
{{- define "ladderstitch.gatewayConfig" -}}
{{- $config := dict
  "replicas" (list (printf "dns:%s-replicas:8001" .Release.Name))
  "host" "0.0.0.0" "port" 8001 "admin_port" 8002 "admin_host" "127.0.0.1" "health_port" 8003
  "metrics_port" 9464
  "tls_certificate" "/etc/ladderstitch/tls/tls.crt" "tls_key" "/etc/ladderstitch/tls/tls.key"
  "token_file" "/etc/ladderstitch/tokens/tokens.yaml"
  "replica_ca" "/etc/ladderstitch/tls/ca.crt" "replica_server_name" .Values.tls.serverName
  "replica_token_file" "/etc/ladderstitch/tokens/gateway-token"
  "drain_announce_s" .Values.drain.announceSeconds "drain_s" .Values.drain.finishSeconds }}
{{- if .Values.tls.mutual }}
{{- $_ := set $config "tls_client_ca" "/etc/ladderstitch/tls/ca.crt" }}
{{- $_ := set $config "replica_certificate" "/etc/ladderstitch/tls/tls.crt" }}
{{- $_ := set $config "replica_key" "/etc/ladderstitch/tls/tls.key" }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{/* Fields of ServerConfig. `server` cannot override fields that the templates rely on. */}}
{{- define "ladderstitch.config" -}}
{{- $fixed := dict
  "host" "0.0.0.0" "port" 8001 "admin_port" 8002 "admin_host" "127.0.0.1" "health_port" 8003
  "metrics_port" 9464
  "tls_certificate" "/etc/ladderstitch/tls/tls.crt" "tls_key" "/etc/ladderstitch/tls/tls.key"
  "token_file" "/etc/ladderstitch/tokens/tokens.yaml"
  "drain_s" .Values.drain.finishSeconds
  "tensor_parallel_size" .Values.tensorParallelSize "spare_ranks" .Values.spareRanks }}
{{- if .Values.model.bundle }}{{ $_ := set $fixed "bundle" .Values.model.bundle }}{{ end }}
{{- if .Values.http.enabled }}{{ $_ := set $fixed "http_port" 8081 }}{{ end }}
{{- if .Values.tls.mutual }}{{ $_ := set $fixed "tls_client_ca" "/etc/ladderstitch/tls/ca.crt" }}{{ end }}
{{- $defaults := dict "max_connection_age_s" 300 }}
{{- toYaml (mergeOverwrite $defaults (deepCopy .Values.server) $fixed) }}
{{- end }}

{{/* The container needs no root user, no capability and no writable root file system. */}}
{{- define "ladderstitch.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "ladderstitch.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
